"""Export a model folder as a stock Qwen3 folder, for every engine that runs one.

An image is only tokens, so nothing is converted: the weights have the stock names, an image code
becomes the token ``<|image:N|>``, and text ids stay what they are. The files are written by hand,
so that an export does not need transformers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from multimodal.files import new_folder
from multimodal.model.checkpoint import ModelParts, find_model, read_config
from multimodal.model.vocabulary import SPECIALS, Vocabulary
from multimodal.tokenizers.image import load_image_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def image_token(code: int) -> str:
    """How an image code is written in a prompt."""
    return f"<|image:{code}|>"


def export_hf(source: str | Path, out: str | Path, dtype: str = "float32") -> None:
    """Write a model folder as a Hugging Face folder. It appears complete or not at all.

    Args:
        source: a model folder, or the name of a bundled model.
        out: a new or empty folder.
        dtype: of the written weights, one of DTYPES.

    Raises:
        ValueError: for a source that is no model folder, another dtype, or a folder that is not
            empty.
    """
    source, out = find_model(source), Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    with new_folder(out) as folder:
        model = ModelParts.load(source, dtype=DTYPES[dtype])
        _write(model, folder, dtype)
        fingerprint = read_config(source).fingerprints.model
        (folder / "README.md").write_text(_readme(model, fingerprint), "utf-8")
        _copy(source, folder, "LICENSE")


def export_model(
    source: str | Path,
    out: str | Path,
    dtype: str = "bfloat16",
    image_tokenizer: str | Path | None = None,
) -> None:
    """Write a model folder again, with its weights rounded.

    Args:
        source: a model folder, or the name of a bundled model.
        out: a new or empty folder.
        dtype: of the written weights, one of DTYPES.
        image_tokenizer: a folder with another decoder for the same codes, to put into the model.

    Raises:
        ValueError: as ``export_hf``, and for an image tokenizer that makes other codes.
    """
    source, out = find_model(source), Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    with new_folder(out) as folder:
        model = ModelParts.load(source)
        if image_tokenizer is not None:
            other = load_image_tokenizer(image_tokenizer)
            if other.codes_fingerprint != model.image_tokenizer.codes_fingerprint:
                raise ValueError(
                    f"{image_tokenizer}: makes other codes than the tokenizer of {source}; "
                    "only its decoder may differ (see decoder_only)"
                )
            model.image_tokenizer = other
        model.save(folder, dtype=DTYPES[dtype])
        _copy(source, folder, "README.md", "LICENSE")


def _copy(source: Path, folder: Path, *names: str) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write(model: ModelParts, folder: Path, dtype: str) -> None:
    vocabulary = model.vocabulary
    ends = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }
    padding = list(range(vocabulary.image_end, vocabulary.size))
    generation = {**ends, "do_sample": False, **({"suppress_tokens": padding} if padding else {})}
    written = {
        "config.json": {**_stock_config(model), **ends, "torch_dtype": dtype},
        "generation_config.json": generation,
        "tokenizer.json": _tokenizer(model),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "model_max_length": model.config.transformer.max_position_embeddings,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
    weights = model.network.transformer.stock_state_dict()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.image_tokenizer.save(folder / "image_tokenizer")


def _stock_config(model: ModelParts) -> dict[str, Any]:
    """``config.json`` of a Qwen3ForCausalLM, with RoPE as transformers 4 and 5 each write it."""
    c = model.config.transformer
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tie_word_embeddings,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _tokenizer(model: ModelParts) -> dict[str, Any]:
    """The text tokenizer with a token for each special and each code, at the ids of Vocabulary.

    Codes are not special tokens there, so that ``skip_special_tokens`` keeps a drawn image.
    """
    vocabulary: Vocabulary = model.vocabulary
    stored: dict[str, Any] = json.loads(model.text_tokenizer.to_json())
    names = [*SPECIALS, *map(image_token, range(vocabulary.codebook_size))]
    added = stored.get("added_tokens") or []  # of the Qwen3 that the model started from
    existing = {*stored["model"]["vocab"], *(token["content"] for token in added)}
    if taken := [name for name in names if name in existing]:
        raise ValueError(f"the text tokenizer has tokens of its own where {taken[:3]} belong")
    stored["added_tokens"] = added + [
        {
            "id": vocabulary.text_size + number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": name in SPECIALS,
        }
        for number, name in enumerate(names)
    ]
    return stored


def _readme(model: ModelParts, fingerprint: str) -> str:
    tokenizer = model.image_tokenizer
    return README.format(
        model=fingerprint,
        image_tokenizer=tokenizer.fingerprint,
        last=model.vocabulary.codebook_size - 1,
        codes=model.codes_per_image,
        read=len(model.config.layout.indices(model.config.reads)),
        reads=", ".join(model.config.reads),
        levels_read=list(model.config.reads),
        levels=", ".join(f"{level.codes} of {level.name}" for level in model.config.layout.levels),
        side=tokenizer.image_size,
    )


README = """\
# A text and image model as a stock Qwen3

Exported from model {model} of the multimodal toolkit. Any engine that runs `Qwen3ForCausalLM` runs
it, without custom code. An image is {codes} tokens, `<|image:0|>` to `<|image:{last}|>`, the codes
of image tokenizer {image_tokenizer} (in `image_tokenizer/`; images of {side} x {side} pixels):
{levels}. An image that is described has {read} of them: {reads}.

    describe   <bos><boi>CODES<eoi>     the model goes on with a caption and <eos>
    draw       <bos>a caption<boi>      the model goes on with {codes} codes and <eoi>
    text       <bos>some text           the model goes on with text and <eos>

A caption through transformers, given the codes of an image:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

codes = [0] * {read}  # of your image: see below
prompt = "<bos><boi>" + "".join(f"<|image:{{code}}|>" for code in codes) + "<eoi>"
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
```

The codes of an image, and the image of drawn codes, with the toolkit:

```python
from multimodal.data.images import fit_image, open_image, to_image, to_tensor
from multimodal.tokenizers.image import load_image_tokenizer

images = load_image_tokenizer(f"{{folder}}/image_tokenizer")
picture = to_tensor(fit_image(open_image("cat.jpg"), images.image_size, images.fit))[None]
codes = images.encode(picture, {levels_read})[0].tolist()  # to describe
whole = images.encode(picture)  # int64[1, {codes}]
to_image(images.decode(whole)[0]).save("as-the-model-sees-it.png")
```

The tokenizer adds nothing by itself: begin a prompt with `<bos>`. Unlike in the toolkit, `<eos>`
or `<|image:3|>` in a text becomes that token here. Masked drawing, editing and the embeddings need
more than a language model: they stay with the toolkit.
"""
