"""Emu3 (arXiv:2409.18869): a Llama, and an image tokenizer that was made for films.

There an image is written with its size in front ("64*64"), a token at the end of each row and one
at its end. Here it is its codes alone, between ``<|image token|>`` and ``<|image end|>``. The
weights and the logits are theirs, but such an image is not what the model was trained on: expect
worse captions and drawings until it is fine-tuned (docs/decisions/released_models.md).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.model.stock import read_weights, transformer_config
from multimodal.released.assemble import Released, ids_of, part_of_config
from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.tokenizers.image import ImageTokenizer
from multimodal.tokenizers.text import TextTokenizer
from multimodal.tokenizers.weights import Fit

SPECIALS = {
    "<bos>": "<|extra_203|>",
    "<eos>": "<|extra_204|>",
    "<pad>": "<|endoftext|>",
    "<boi>": "<|image token|>",  # the last token before the codes
    "<eoi>": "<|image end|>",
    "<null>": "<|endoftext|>",
}
SIZE: int = 512
FIT: Fit = "crop"
# What the classes of transformers assume where config.json says nothing.
TEXT_DEFAULTS = {
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
VISION_DEFAULTS = {
    "codebook_size": 32768,
    "embed_dim": 4,
    "latent_channels": 4,
    "temporal_downsample_factor": 4,
    "base_channels": 256,
    "channel_multiplier": [1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [3],
    "num_attention_heads": 1,
}


def read(folder: Path, config: dict[str, Any], image_size: int | None, fit: Fit | None) -> Released:
    """Read a folder. image_size, fit: of images. None: 512, cropped.

    Raises:
        ValueError: for anything else than an Emu3.
    """
    texts, vision, tokens = (
        part_of_config(config, name) for name in ("text_config", "vq_config", "vocabulary_map")
    )
    llama = {**TEXT_DEFAULTS, **texts, "model_type": "llama"}
    weights, image_weights = sorted_weights(read_weights(folder))
    text = TextTokenizer.load(folder)
    return Released(
        transformer_config(llama, str(folder)),
        weights,
        text,
        ids_of(text, SPECIALS),
        image_codes(tokens),
        ImageTokenizer(
            detail=image_tokenizer(image_weights, vision, image_size or SIZE, fit or FIT)
        ),
    )


def sorted_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of the transformer by stock names, and those of the image tokenizer.

    transformers 4 and 5 name them differently.
    """
    ours, images = {}, {}
    for name, weight in weights.items():
        if match := re.fullmatch(r"(?:model\.)?vqmodel\.(.+)", name):
            images[match[1]] = weight.float()
        elif name.endswith("lm_head.weight"):
            ours["lm_head.weight"] = weight
        else:
            ours[re.sub(r"^(?:model\.)?text_model\.(?:model\.)?", "model.", name)] = weight
    return ours, images


def image_codes(tokens: Mapping[str, int]) -> list[int]:
    """The id of each code. The token of code 102 is ``<|visual token 000102|>``."""
    codes = {}
    for token, number in tokens.items():
        if match := re.fullmatch(r"<\|visual token (\d+)\|>", token):
            codes[int(match[1])] = number
    return [codes[code] for code in range(len(codes)) if code in codes]


def image_tokenizer(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], image_size: int, fit: Fit
) -> VQTokenizer:
    """The image tokenizer of its weights.

    Args:
        weights: by their names.
        config: ``vq_config``.
        image_size, fit: of images.

    Raises:
        ValueError: for weights of another shape.
    """
    config = {**VISION_DEFAULTS, **config}
    multipliers, codes = list(config["channel_multiplier"]), weights["quantize.embedding.weight"]
    if config["num_attention_heads"] != 1:
        raise ValueError("attention of several heads in the image tokenizer is not supported")
    sizes = VQTokenizerConfig(
        image_size,
        fit,
        2 ** (len(multipliers) - 1),
        {
            "name": "emu3",
            "channels": config["base_channels"],
            "multipliers": multipliers,
            "depth": config["num_res_blocks"],
            "attention": [n in config["attn_resolutions"] for n in range(len(multipliers))],
            "latent_channels": config["latent_channels"],
            "frames": config["temporal_downsample_factor"],
        },
        {
            "name": "vq",
            "codebook_size": config["codebook_size"],
            "channels": config["embed_dim"],
            "normalise": False,
            "learning": "gradient",
        },
    )
    with torch.device("meta"):  # shapes alone: these sizes may be a lie
        shapes = VQTokenizer(sizes).state_dict()
    translated = {our_name(name, len(multipliers) - 1): w for name, w in weights.items()}
    for name, expected in shapes.items():
        # Their attention is of linear layers, ours of 1 x 1 convolutions.
        if name in translated and expected.ndim == 4 and translated[name].ndim == 2:
            translated[name] = translated[name][:, :, None, None]
    translated["quantizer.counts"] = torch.ones(len(codes))
    translated["quantizer.initialised"] = torch.tensor(True)
    for name in sorted(shapes.keys() | translated.keys()):
        has, says = (tuple(w[name].shape) if name in w else None for w in (translated, shapes))
        if has != says:
            raise ValueError(
                f"its image tokenizer and its config.json differ: {name} has shape {has}, "
                f"expected {says}"
            )
    tokenizer = VQTokenizer(sizes)
    tokenizer.load_state_dict(translated)
    return tokenizer.eval()


# Their names in ours, one after the other.
NAMES = (
    (r"^quantize\.embedding", "quantizer.codebook"),
    (r"^quant_conv\.conv", "encoder.to_code.out"),
    (r"^post_quant_conv\.conv", "decoder.from_code"),
    (r"^encoder\.time_conv\.(\d+)\.conv\.conv", r"encoder.to_code.shrink.\1"),
    (r"^encoder\.time_res_stack", "encoder.to_code.blocks"),
    (r"^decoder\.time_conv\.(\d+)\.conv\.conv", r"decoder.grow.\1"),
    (r"^decoder\.time_res_stack", "decoder.blocks"),
    (r"(blocks\.\d+\.conv\d)\.conv\.", r"\1."),
    (r"down_block\.down\.(\d+)", r"levels.\1"),
    (r"(levels\.\d+)\.block\.", r"\1.blocks."),
    (r"(levels\.\d+)\.attn_norms\.(\d+)", r"\1.attention.\2.norm"),
    (r"(levels\.\d+)\.attn\.", r"\1.attention."),
    (r"(levels\.\d+)\.(?:down|up)sample\.conv", r"\1.resize"),
    (r"middle_block\.block_1", "middle.0"),
    (r"middle_block\.attn_1", "middle.1"),
    (r"middle_block\.attn_norm", "middle.1.norm"),
    (r"middle_block\.block_2", "middle.2"),
    (r"\.norm_layer\.", ".norm."),
    (r"\.conv_y\.", ".scale."),
    (r"\.conv_b\.", ".shift."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
)


def our_name(name: str, last: int) -> str:
    """Of a weight of the image tokenizer. last: the decoder's last level, as theirs count from the
    pixels."""
    name = re.sub(
        r"up_block\.up\.(\d+)", lambda match: f"levels.{last - int(match[1])}", name, count=1
    )
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name
