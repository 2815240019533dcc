"""Tiny random unified models of transformers, and ours that were imported from them."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.model.layers.attention import attention_mask
from multimodal.tokenizers.text import TextTokenizer

CODES = 64
SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=512, initializer_range=0.3,
)  # fmt: skip


def randomised(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """Change all weights. Untrained norms are all 1, so swapped ones would pass unseen."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(scale * torch.randn_like(weight))
    return module.eval()


def images(count: int = 4, size: int = 32) -> Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return 2 * F.interpolate(noise, size, mode="bilinear") - 1


def with_tokens(sentences: Sequence[str], first: list[str], last: list[str]) -> dict[str, Any]:
    """A BPE, as JSON, with control tokens before and behind what it learnt."""
    stored: dict[str, Any] = json.loads(TextTokenizer.train([*sentences] * 4, 300).to_json())
    learnt = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].__getitem__)
    everything = [*first, *learnt, *last]
    stored["model"]["vocab"] = {token: number for number, token in enumerate(everything)}
    stored["added_tokens"] = [
        {"id": everything.index(token), "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for token in [*first, *last]
    ]  # fmt: skip
    return stored


class Pair:
    """A model of transformers, and ours that was imported from its folder by the command line.

    Args:
        make: the random model of transformers, of a vocabulary.
        tokenizer: theirs, as JSON.
        special: our specials by their tokens there.
        code_token: the token of a code there.
        encode: images to codes by their image tokenizer.
        options: of the command.

    Attributes:
        folder: theirs. out: ours.
    """

    def __init__(
        self, folder: Path, make: Callable[[dict[str, int]], Any], tokenizer: dict[str, Any],
        special: dict[str, str], code_token: Callable[[int], str],
        encode: Callable[[Any, Tensor], Tensor], options: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.folder, self.out = folder / "theirs", folder / "ours"
        self.special, self.code_token, self.encode = special, code_token, encode
        self.vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
        self.stock = make(self.vocabulary)
        self.stock.save_pretrained(self.folder)
        self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
        self.tokenizer.save(str(self.folder / "tokenizer.json"))
        assert main(["import", str(self.folder), str(self.out), *options]) == 0
        self.ours: Model = load(self.out)

    @cached_property
    def rows(self) -> Tensor:
        """Their id of each of our ids, by the names of tokens: int64[V], -1 where there is none."""
        ours = self.ours.vocabulary
        rows = torch.full((ours.size,), -1)
        for token, number in self.ours.text_tokenizer.vocabulary().items():
            rows[number] = self.vocabulary[token]
        for name, token in self.special.items():
            rows[ours.special(name)] = self.vocabulary[token]
        for code in range(CODES):
            rows[ours.image_start + code] = self.vocabulary[self.code_token(code)]
        return rows

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Ours: int64[B, L] -> float32[B, L, V]."""
        documents = torch.ones_like(ids)
        mask = attention_mask(documents, torch.zeros_like(ids))
        transformer = self.ours.network.transformer
        return transformer.logits(transformer(ids, documents.cumsum(1) - 1, mask))

    @torch.inference_mode()
    def their_logits(self, ids: Tensor) -> Tensor:
        """Theirs, by our ids, before they suppress codes: int64[B, L] -> float32[B, L, V].

        Ids that they do not have get 0.
        """
        hidden = self.stock.model(self.rows[ids]).last_hidden_state
        return self.stock.lm_head(hidden)[..., self.rows.clamp(min=0)] * (self.rows >= 0)

    @torch.inference_mode()
    def their_codes(self, pixels: Tensor) -> Tensor:
        """float[B, 3, H, W] in [-1, 1] -> int64[B, n], code numbers."""
        return self.encode(self.stock.model.vqmodel, pixels).flatten(1)

    @torch.inference_mode()
    def their_images(self, codes: Tensor) -> Tensor | None:
        """int64[B, n] -> float[B, 3, H, W], not clipped. None: their class has no decoder."""
        tokenizer = self.stock.model.vqmodel
        side = round(codes.shape[1] ** 0.5)
        return (
            tokenizer.decode(codes.unflatten(1, (side, side)))
            if hasattr(tokenizer, "decode")
            else None
        )

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """The text that theirs goes on with, by our ids, up to the end of the text."""
        vocabulary = self.ours.vocabulary
        allowed = [*self.rows[: vocabulary.text_size].tolist(), int(self.rows[vocabulary.eos])]
        ids = self.rows[torch.tensor([prompt])]
        output = self.stock.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            suppress_tokens=[*{*range(self.stock.lm_head.out_features)}.difference(allowed)],
            eos_token_id=allowed[-1], pad_token_id=0, do_sample=False,
        )  # fmt: skip
        ours = {theirs: number for number, theirs in enumerate(self.rows.tolist())}
        text = [ours[number] for number in output[0, len(prompt) :].tolist()]
        return text[: text.index(vocabulary.eos)] if vocabulary.eos in text else text


def chameleon(folder: Path, sentences: Sequence[str], swin: bool = False, *options: str) -> Pair:
    """A Chameleon of 64 codes and images of 32 x 32 pixels."""

    def code_token(code: int) -> str:
        letters = "".join(chr(ord("A") + int(digit)) for digit in str(code))
        return f"IMGIMG{letters}Z"

    codes = torch.randperm(CODES, generator=torch.Generator().manual_seed(3)).tolist()
    first = ["<s>", "<pad>", "</s>", "<unk>", *map(code_token, codes), "<eoss>", "<racm3:break>"]
    tokenizer = with_tokens(sentences, first, ["<image>", "<reserved08706>"])
    tokenizer["model"]["unk_token"] = "<unk>"

    def make(vocabulary: dict[str, int]) -> Any:
        torch.manual_seed(0)
        vision = {
            "base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1,
            "embed_dim": 8, "latent_channels": 16, "num_embeddings": CODES, "resolution": 32,
        }  # fmt: skip
        config = transformers.ChameleonConfig(
            vocab_size=len(vocabulary) + 5, vocabulary_map=vocabulary, vq_config=vision,
            swin_norm=swin, model_parallel_size=2, **SIZES,
        )  # fmt: skip
        return randomised(transformers.ChameleonForConditionalGeneration(config))

    special = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<pad>", "<boi>": "<racm3:break>",
               "<eoi>": "<eoss>", "<null>": "<pad>"}  # fmt: skip

    def encode(tokenizer: Any, pixels: Tensor) -> Tensor:
        return tokenizer.encode(pixels).image_tokens.view(len(pixels), -1)

    return Pair(folder, make, tokenizer, special, code_token, encode, options)


def emu3(folder: Path, sentences: Sequence[str]) -> Pair:
    """An Emu3 of 64 codes and images of 32 x 32 pixels."""

    def code_token(code: int) -> str:
        return f"<|visual token {code:06}|>"

    codes = torch.randperm(CODES, generator=torch.Generator().manual_seed(3)).tolist()
    named = ["endoftext", "image start", "image end", "image token", "extra_200", "extra_201",
             "extra_203", "extra_204"]  # fmt: skip
    last = [*(f"<|{name}|>" for name in named), "<image>", *map(code_token, codes)]
    tokenizer = with_tokens(sentences, [], last)

    def make(vocabulary: dict[str, int]) -> Any:
        torch.manual_seed(0)
        vision = {
            "base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1,
            "embed_dim": 4, "latent_channels": 4, "codebook_size": CODES, "attn_resolutions": [2],
            "hidden_size": 64,
        }  # fmt: skip
        texts = {"vocab_size": len(vocabulary) + 5, "pad_token_id": 0, **SIZES}
        config = transformers.Emu3Config(
            vocabulary_map=vocabulary, vq_config=vision, text_config=texts
        )
        model = randomised(transformers.Emu3ForConditionalGeneration(config))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        codebook = model.model.vqmodel.quantize.embedding.weight
        with torch.no_grad():  # as far apart as latents are, so that images use many codes
            codebook.copy_(torch.randn_like(codebook))
        return model

    special = {"<bos>": "<|extra_203|>", "<eos>": "<|extra_204|>", "<pad>": "<|endoftext|>",
               "<boi>": "<|image token|>", "<eoi>": "<|image end|>",
               "<null>": "<|endoftext|>"}  # fmt: skip

    def encode(tokenizer: Any, pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return torch.stack(tokenizer.encode(pixels, sizes).image_tokens)

    return Pair(folder, make, tokenizer, special, code_token, encode, ["--image-size", "32"])


def complete_vqgan(encoder: Any) -> tuple[dict[str, Tensor], Any]:
    """The weights of a Chameleon's image tokenizer with a decoder, and whose decoder it is.

    The class of transformers has none: take that of a Janus of the same shape, without attention in
    its levels. The levels are numbered from the pixels, as Meta does.
    """
    config = encoder.config
    sizes = {
        name: getattr(config, name)
        for name in ("base_channels", "channel_multiplier", "num_res_blocks", "embed_dim",
                     "latent_channels", "num_embeddings")
    }  # fmt: skip
    janus: Any = randomised(transformers.JanusVQVAE(transformers.JanusVQVAEConfig(**sizes)))
    for blocks in janus.decoder.up:
        blocks.attn = nn.ModuleList()
    weights = dict(encoder.state_dict())
    last = len(config.channel_multiplier) - 1
    for name, weight in janus.decoder.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up":
            parts[1] = str(last - int(parts[1]))
        weights[".".join(["decoder", *parts])] = weight.contiguous()
    return weights, janus
