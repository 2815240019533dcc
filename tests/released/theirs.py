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
from multimodal.model.attention import attention_mask
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
        options: of the command.

    Attributes:
        folder: theirs. out: ours.
    """

    def __init__(
        self, folder: Path, make: Callable[[dict[str, int]], Any], tokenizer: dict[str, Any],
        special: dict[str, str], code_token: Callable[[int], str], options: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.folder, self.out, self.special, self.code_token = (
            folder / "theirs", folder / "ours", special, code_token,
        )  # fmt: skip
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
    return Pair(folder, make, tokenizer, special, code_token, options)
