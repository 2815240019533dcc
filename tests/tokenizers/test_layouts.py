"""Text tokenizers in the layouts that language models have: ids and texts of transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from multimodal.api import Model
from multimodal.inference.json_schema import Schema, token_bytes
from multimodal.inference.text import generate_ids
from multimodal.model.objectives import ObjectivesConfig
from multimodal.options import TextOptions
from multimodal.tokenizers.text import TextTokenizer
from tests.layouts import CONTROL, hostile_strings, made_as


@pytest.mark.parametrize("layout", ["gpt 2", "smollm 2", "qwen", "llama 3", "llama 2"])
def test_ids_and_texts_are_those_of_transformers(
    layout: str, tmp_path: Path, sentences: tuple[str, ...]
) -> None:
    made = made_as(layout, [*sentences, "In 2024 it's 10 or 250 degrees.", "don't\n\nwe'll"] * 4)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    theirs.save_pretrained(tmp_path)
    ours = TextTokenizer.load(tmp_path)
    splits = set()
    for text in hostile_strings(1000):
        ids = ours.encode(text)
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == expected, repr(text)
        assert not {made.token_to_id(token) for token in CONTROL[1:]} & set(ids), repr(text)
        decoded = theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == decoded, repr(text)
        splits.add(len(ids))
    assert len(splits) > 10
    numbers = [len(ours.encode(f" {number}")) for number in (7, 77, 777)]
    if layout in ("smollm 2", "qwen"):
        assert numbers[2] - numbers[1] == numbers[1] - numbers[0] == 1, "a digit is a token"


def model_of(text_tokenizer: Tokenizer, tiny_model: Callable[..., Model]) -> Model:
    torch.manual_seed(0)
    images = tiny_model().image_tokenizer
    return Model.new("tiny", TextTokenizer(text_tokenizer), images, ObjectivesConfig()).eval()


@pytest.mark.parametrize("layout", ["qwen", "llama 2"])
def test_a_json_schema_is_followed_in_the_bytes_of_each_layout(
    layout: str, sentences: tuple[str, ...], tiny_model: Callable[..., Model]
) -> None:
    model = model_of(made_as(layout, [*sentences, '{"word": "a b"}'] * 4), tiny_model)
    tokens, tokenizer = token_bytes(model), model.text_tokenizer
    for text in ("a red bus", "na\u00efve \u732b", '{"word": "x y"}\n'):
        written = b"".join(tokens[i] for i in tokenizer.encode(text)).decode()
        assert written == (f" {text}" if layout == "llama 2" else text)
    words = ["two  dogs", "na\u00efve \u732b", "red"]
    schema = Schema(model, {"type": "array", "items": {"enum": words}, "maxItems": 3})
    prompts = [[model.vocabulary.bos]] * 40
    options = TextOptions(temperature=1.5, max_tokens=150)
    texts = [tokenizer.decode(ids) for ids in generate_ids(model, prompts, options, schema=schema)]
    assert {word for text in texts for word in json.loads(text)} == set(words)
    # What the tokenizer itself makes of a JSON text can be generated.
    state = schema.start()
    for token in tokenizer.encode('["red","na\u00efve \u732b"]'):
        assert state.allowed(torch.zeros(len(tokens)))[token]
        state.read(token)
    assert state.done


def test_a_tokenizer_that_cannot_write_every_byte_follows_no_schema(
    tiny_model: Callable[..., Model],
) -> None:
    words = models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    with pytest.raises(ValueError, match="a JSON schema needs a text tokenizer that can write"):
        Schema(model_of(Tokenizer(words), tiny_model), {"type": "integer"})
