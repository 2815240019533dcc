"""Answers in JSON that follows a schema, and answers from a list of choices."""

import json
from collections.abc import Callable
from dataclasses import replace
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
from multimodal.options import AnswerOptions, TextOptions

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "bl\u00fce"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 12},
        "word": {"type": "string", "maxLength": 6},
        "ok": {"type": "boolean"},
    },
    "required": ["colour", "count", "word", "ok"],
    "additionalProperties": False,
}
OPTIONS = TextOptions(max_tokens=120)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(seed=2, noise=0.1)


def prompts_of(model: Model, count: int) -> list[list[int]]:
    codes = torch.randint(64, (count, 16), generator=torch.Generator().manual_seed(0))
    return [describe_prompt(model.vocabulary, row) for row in codes.tolist()]


def test_the_bytes_of_tokens_are_those_of_texts(model: Model) -> None:
    tokens = token_bytes(model)
    for text in ("a red bus", "na\u00efve \u732b \U0001f408", "\n\t{}"):
        assert b"".join(tokens[i] for i in model.text_tokenizer.encode(text)) == text.encode()
    assert not any(tokens[model.vocabulary.text_size :])


def test_all_of_two_hundred_answers_follow_the_schema(model: Model) -> None:
    schema, options = Schema(model, SCHEMA), replace(OPTIONS, temperature=1.5)
    texts = generate_ids(model, prompts_of(model, 200), options, schema=schema)
    answers = [json.loads(model.text_tokenizer.decode(text)) for text in texts]
    assert len(answers) == 200
    for answer in answers:
        assert answer.keys() == SCHEMA["properties"].keys()
        assert answer["colour"] in ("red", "bl\u00fce") and 0 <= answer["count"] <= 12
        assert isinstance(answer["word"], str) and len(answer["word"]) <= 6
        assert answer["ok"] in (True, False)
    assert len({json.dumps(answer) for answer in answers}) > 150, "the model chooses"


def test_a_batch_is_each_text_alone_and_unfinished_texts_are_an_error(model: Model) -> None:
    schema, prompts = Schema(model, SCHEMA), prompts_of(model, 4)
    together = generate_ids(model, prompts, OPTIONS, schema=schema)
    alone = [generate_ids(model, [prompt], OPTIONS, schema=schema)[0] for prompt in prompts]
    assert together == alone
    short = TextOptions(max_tokens=5)
    with pytest.raises(ValueError, match="4 of 4 texts do not follow the schema to its end in 5 "):
        generate_ids(model, prompts, short, schema=schema)
    endless = Schema(model, {"type": "array", "items": {"type": "integer"}, "minItems": 99})
    with pytest.raises(ValueError, match=r"numbers \(maximum\) .* The text so far: '\[-?[0-9]"):
        generate_ids(model, prompts, OPTIONS, schema=endless)
    with pytest.raises(ValueError, match="a JSON schema says where .* give it or stop"):
        generate_ids(model, prompts, replace(short, stop=("a",)), schema=schema)
    with pytest.raises(ValueError, match="beams and a JSON schema"):
        generate_ids(model, prompts, replace(short, beams=2), schema=schema)


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": 3}])
def test_an_invalid_schema_is_refused(model: Model, schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="schema"):
        Schema(model, schema)


def test_the_choice_is_the_most_likely(model: Model) -> None:
    codes = torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(1))
    choices = ["yes", "no", "a red bus in the snow"]
    options, questions = AnswerOptions(), ["is it?"] * 5
    answers = answer_codes(model, codes, questions, options, choices=choices)
    prompt = model.config.templates.ask("is it?")
    for row, answer in zip(codes, answers, strict=True):
        (likelihoods,) = choice_likelihoods(model, row[None], [prompt], [choices])
        assert answer == choices[int(likelihoods.argmax())]
    reverse = answer_codes(model, codes[:1], questions[:1], options, choices=choices[::-1])
    assert reverse == answers[:1]
    for wrong in ([], ["yes"], ["yes", "yes"]):
        with pytest.raises(ValueError, match="two or more"):
            answer_codes(model, codes, questions, options, choices=wrong)


def test_the_command_takes_choices_and_a_schema(
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
    (tmp_path / "odd.json").write_text('{"type": "integer", "minimum": 5, "maximum": 3}')
    assert main([*line, "--schema", str(tmp_path / "odd.json")]) == 1
    assert "odd.json: the JSON schema cannot be followed" in capsys.readouterr().err
    assert main([*line, "--choices", "one"]) == 1
    assert "two or more" in capsys.readouterr().err
