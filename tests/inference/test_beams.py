"""Beam search finds what transformers finds; min-p and the penalty leave out what they should."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from multimodal.api import Model
from multimodal.inference.text import GREEDY, generate_ids
from multimodal.model.export import export_hf
from multimodal.model.sequences import describe_prompt
from multimodal.options import Sampling

Make = Callable[..., Model]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(seed=1, noise=0.15)


def prompts_of(model: Model) -> list[list[int]]:
    codes = torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(3))
    images = (codes + model.vocabulary.image_start).tolist()
    return [describe_prompt(model.vocabulary, row)[: 19 - n] for n, row in enumerate(images)]


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 1.0), (3, 0.0), (5, 2.0)])
def test_beams_are_those_of_transformers(
    model: Model, tmp_path: Path, beams: int, penalty: float
) -> None:
    model.save(tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "stock")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    v = model.vocabulary
    prompts = prompts_of(model)
    sampling = Sampling(beams=beams, length_penalty=penalty)
    found = generate_ids(model, prompts, 9, sampling)
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            ids = theirs.generate(
                torch.tensor([prompt]), num_beams=beams, length_penalty=penalty, max_new_tokens=9,
                do_sample=False, early_stopping=False, eos_token_id=v.eos, pad_token_id=v.pad,
                suppress_tokens=[i for i in range(v.text_size, v.size) if i != v.eos],
            )[0, len(prompt):].tolist()  # fmt: skip
        expected.append(ids[: ids.index(v.eos)] if v.eos in ids else ids)
    assert found == expected
    assert [generate_ids(model, [prompt], 9, sampling)[0] for prompt in prompts] == found
    assert found != generate_ids(model, prompts, 9, GREEDY), "a case that tells them apart"


def test_min_p_keeps_what_is_likely_enough() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = Sampling(temperature=1.0, min_p=0.31).truncate(logits).isfinite()
    assert kept.tolist() == [[True, True, False, False]]
    assert Sampling(temperature=1.0, min_p=1.0).truncate(logits).isfinite().sum() == 1


def test_the_penalty_falls_on_own_tokens_alone(model: Model) -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    found = Sampling(repetition_penalty=2.0).penalise(logits, [[0, 1, 1], []])
    assert found.tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]]
    often = generate_ids(model, prompts_of(model), 20, GREEDY)
    seldom = generate_ids(model, prompts_of(model), 20, Sampling(repetition_penalty=50.0))
    assert any(len(set(text)) < len(text) for text in often)
    assert all(len(set(text)) == len(text) for text in seldom)


@pytest.mark.parametrize(
    "options", [{"min_p": 2.0}, {"repetition_penalty": 0.0}, {"beams": 0},
                {"beams": 2, "temperature": 1.0}],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]


def test_beams_do_not_draw(model: Model) -> None:
    with pytest.raises(ValueError, match="are for texts"):
        model.draw("a red bus", beams=2, temperature=0.0)
    with pytest.raises(ValueError, match="beam search is for texts"):
        model.generate(["a red bus"], output="any", beams=2)
