"""Answers in JSON that follows a schema, and answers out of a list."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal.api import Model
from multimodal.cli import main
from multimodal.inference.json_schema import Schema, token_bytes
from multimodal.inference.likelihoods import choice_likelihoods
from multimodal.inference.text import answer_codes, generate_ids
from multimodal.model.sequences import describe_prompt
from multimodal.options import Sampling

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "bl\u00fce"]}, "count": {"type": "integer", "minimum": 0,
                                                        "maximum": 12},
        "said": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"},
    },
    "required": ["colour", "count", "said", "ok"], "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(seed=2, noise=0.1)


def prompts_of(model: Model, count: int) -> list[list[int]]:
    codes = torch.randint(64, (count, 16), generator=torch.Generator().manual_seed(0))
    return [describe_prompt(model.vocabulary, row)
            for row in (codes + model.vocabulary.image_start).tolist()]  # fmt: skip


def test_the_bytes_of_tokens_are_those_of_texts(model: Model) -> None:
    known = token_bytes(model)
    for text in ("a red bus", "na\u00efve \u732b \U0001f408", "\n\t{}"):
        assert b"".join(known[i] for i in model.text_tokenizer.encode(text)) == text.encode()
    assert not any(known[model.vocabulary.text_size :])


def test_all_of_two_hundred_answers_follow_the_schema(model: Model) -> None:
    schema, sampling = Schema(model, SCHEMA), Sampling(temperature=1.5)
    texts = generate_ids(model, prompts_of(model, 200), 120, sampling, schema=schema)
    found = [json.loads(model.text_tokenizer.decode(text)) for text in texts]
    assert len(found) == 200
    for one in found:
        assert one.keys() == SCHEMA["properties"].keys()
        assert one["colour"] in ("red", "bl\u00fce") and 0 <= one["count"] <= 12
        assert isinstance(one["said"], str) and len(one["said"]) <= 6 and one["ok"] in (True, False)
    assert len({json.dumps(one) for one in found}) > 150, "the model chooses, not the schema"


def test_batch_equals_single_and_what_does_not_end_is_said(model: Model) -> None:
    schema, prompts = Schema(model, SCHEMA), prompts_of(model, 4)
    together = generate_ids(model, prompts, 120, schema=schema)
    assert together == [generate_ids(model, [one], 120, schema=schema)[0] for one in prompts]
    with pytest.raises(ValueError, match="4 of 4 texts do not follow the schema to its end in 5 "):
        generate_ids(model, prompts, 5, schema=schema)
    with pytest.raises(ValueError, match="stop, and a JSON schema"):
        generate_ids(model, prompts, 5, schema=schema, stop=["a"])
    with pytest.raises(ValueError, match="beams, and a JSON schema"):
        generate_ids(model, prompts, 5, Sampling(beams=2), schema=schema)


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": 3}])
def test_a_schema_that_is_none_is_refused(model: Model, schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="schema"):
        Schema(model, schema)


def test_the_choice_is_the_likeliest(model: Model) -> None:
    codes = torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(1))
    choices = ["yes", "no", "a red bus in the snow"]
    found = answer_codes(model, codes, ["is it?"] * 5, choices=choices)
    asked = model.config.templates.ask("is it?")
    for row, answer in zip(codes, found, strict=True):
        (likely,) = choice_likelihoods(model, row[None], [asked], [choices])
        assert answer == choices[int(likely.argmax())]
    assert answer_codes(model, codes[:1], ["is it?"], choices=choices[::-1]) == found[:1]
    for wrong in ([], ["yes"], ["yes", "yes"]):
        with pytest.raises(ValueError, match="expected two or more"):
            answer_codes(model, codes, ["is it?"] * 5, choices=wrong)


def test_the_command_answers_so(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "broken.json").write_text("{")
    line = ["answer", "--model", str(tiny_model_folder), str(tmp_path / "a.png"), "what is it?"]
    assert main([*line, "--choices", "a bus", "a cat"]) == 0
    assert capsys.readouterr().out.strip() in ("a bus", "a cat")
    schema = ["--schema", str(tmp_path / "schema.json"), "--max-tokens", "120"]
    assert main([*line, *schema]) == 0
    assert json.loads(capsys.readouterr().out).keys() == SCHEMA["properties"].keys()
    assert main([*line, "--schema", str(tmp_path / "broken.json")]) == 1
    assert "not readable as JSON" in capsys.readouterr().err
    assert main([*line, "--choices", "one"]) == 1
    assert "expected two or more" in capsys.readouterr().err
