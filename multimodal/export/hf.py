"""Export a model folder as a stock language model, for every engine that runs one.

An image is only tokens, so nothing is converted: the weights have the stock names, an image code
becomes the token ``<|image:N|>``, and text ids stay what they are. The files are written by hand,
so that an export does not need transformers.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from multimodal.export.model import DTYPES
from multimodal.files import local_path, new_folder
from multimodal.hub.names import find_model
from multimodal.model.checkpoint import ModelParts, read_config
from multimodal.model.stock import family_of, stock_config
from multimodal.model.vocabulary import SPECIALS, Vocabulary, image_token
from multimodal.tokenizers.chat import ChatFormat


def export_hf(source: str | Path, out: str | Path, dtype: str = "float32") -> str:
    """Write a model folder as a Hugging Face folder. It appears complete or not at all.

    Args:
        source: a model: see multimodal/hub/names.py.
        out: a new or empty folder.
        dtype: of the written weights, one of DTYPES.

    Returns:
        The stock class that loads it.

    Raises:
        ValueError: for a source that is no model folder, another dtype, or a folder that is not
            empty.
    """
    source, out = find_model(source), local_path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    with new_folder(out) as folder:
        model = ModelParts.load(source).dequantized()
        model.network.to(DTYPES[dtype])
        _write(model, folder, dtype)
        fingerprint = read_config(source).fingerprints.model
        card = f"{_readme(model, fingerprint)}\n{model.provenance.section()}"
        (folder / "README.md").write_text(card, "utf-8")
        model.provenance.write(folder)
    return family_of(model.config.transformer)[1].stock_class


def _write(model: ModelParts, folder: Path, dtype: str) -> None:
    vocabulary = model.vocabulary
    ends = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }
    padding = list(range(vocabulary.image_end, vocabulary.size))
    generation = {**ends, "do_sample": False, **({"suppress_tokens": padding} if padding else {})}
    chat = model.text_tokenizer.chat
    ours = {  # what a stock class does not need, and `multimodal import` does
        "image_levels": {"reads": list(model.config.reads), "draws": list(model.config.draws)},
        "templates": asdict(model.config.templates),
        "chat_format": None if chat is None else asdict(chat),
        "end_tokens": list(model.text_tokenizer.ends),
    }
    config = {**stock_config(model.config.transformer), **ends, "torch_dtype": dtype}
    written: dict[str, dict[str, Any]] = {
        "config.json": {**config, **ours},
        "generation_config.json": generation,
        "tokenizer.json": exported_tokenizer(model),
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
    if ends_of_texts := model.text_tokenizer.end_ids:
        last = [vocabulary.eos, *ends_of_texts]
        written["generation_config.json"]["eos_token_id"] = last
    if chat is not None:
        written["tokenizer_config.json"]["chat_template"] = chat_template(chat)
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
    weights = model.network.transformer.stock_state_dict()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.image_tokenizer.save(folder / "image_tokenizer")


def chat_template(chat: ChatFormat) -> str:
    """The template with its own tokens: an engine would put <eos> and <bos> in their place."""
    tokens = {"eos_token": chat.end, "bos_token": chat.begin}
    used = [
        f"{{%- set {name} = {json.dumps(token, ensure_ascii=False)} %}}"
        for name, token in tokens.items()
        if name in chat.template
    ]
    return "".join([*used, chat.template])


def exported_tokenizer(model: ModelParts) -> dict[str, Any]:
    """The text tokenizer with a token for each special and each code, at the ids of Vocabulary.

    Codes are not special tokens there, so that ``skip_special_tokens`` keeps a drawn image. It adds
    no token to a text.
    """
    vocabulary: Vocabulary = model.vocabulary
    stored: dict[str, Any] = json.loads(model.text_tokenizer.to_json())
    stored["post_processor"] = None  # that of a language model may begin each prompt
    names = [*SPECIALS, *map(image_token, range(vocabulary.codebook_size))]
    added = stored.get("added_tokens") or []  # of the language model that it started from
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
        stock_class=family_of(model.config.transformer)[1].stock_class,
        model=fingerprint,
        image_tokenizer=tokenizer.fingerprint,
        last=model.vocabulary.codebook_size - 1,
        codes=model.codes_per_image,
        drawn=model.codes_drawn,
        draws=", ".join(model.config.draws),
        read=len(model.config.layout.indices(model.config.reads)),
        reads=", ".join(model.config.reads),
        levels_read=list(model.config.reads),
        levels=", ".join(f"{level.codes} of {level.name}" for level in model.config.layout.levels),
        side=tokenizer.image_size,
    )


README = """\
# A text and image model as a stock {stock_class}

Exported from model {model} of the multimodal toolkit. Any engine that runs
`{stock_class}` runs it, without custom code. An image is {codes} tokens,
`<|image:0|>` to `<|image:{last}|>`, the codes of image tokenizer {image_tokenizer}
(in `image_tokenizer/`; images of {side} x {side} pixels): {levels}.
An image that is described has {read} of them: {reads}. One that is drawn has {drawn}: {draws}
(`image_levels` of `config.json`).

    describe   <bos><boi>CODES<eoi>     the model goes on with a caption and <eos>
    draw       <bos>a caption<boi>      the model goes on with {drawn} codes and <eoi>
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
