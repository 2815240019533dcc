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


def test_beams_do_not_draw(model: Model) -> None:
    with pytest.raises(ValueError, match="are for texts"):
        model.draw("a red bus", beams=2, temperature=0.0)
    with pytest.raises(ValueError, match="beam search is for texts"):
        model.generate(["a red bus"], output="any", beams=2)
