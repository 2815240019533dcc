"""Beam search finds the same texts as transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from multimodal.api import Model
from multimodal.export.hf import export_hf
from multimodal.inference.text import generate_ids
from multimodal.model.sequences import describe_prompt
from multimodal.options import TextOptions
from multimodal.tokenizers.text import TextTokenizer

Make = Callable[..., Model]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(seed=1, noise=0.15)


def prompts_of(model: Model) -> list[list[int]]:
    codes = torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(3))
    rows = enumerate(codes.tolist())
    return [describe_prompt(model.vocabulary, row)[: 19 - n] for n, row in rows]


@pytest.mark.parametrize(("beams", "penalty"), [(2, 1.0), (4, 1.0), (3, 0.0), (5, 2.0)])
def test_beams_are_those_of_transformers(
    model: Model, tmp_path: Path, beams: int, penalty: float
) -> None:
    model.save(tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "stock")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    v = model.vocabulary
    prompts = prompts_of(model)
    options = TextOptions(beams=beams, length_penalty=penalty, max_tokens=9)
    ours = generate_ids(model, prompts, options)
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            output = theirs.generate(
                torch.tensor([prompt]),
                num_beams=beams,
                length_penalty=penalty,
                max_new_tokens=9,
                do_sample=False,
                early_stopping=False,
                eos_token_id=v.eos,
                pad_token_id=v.pad,
                suppress_tokens=[i for i in range(v.text_size, v.size) if i != v.eos],
            )
        ids = output[0, len(prompt) :].tolist()
        expected.append(ids[: ids.index(v.eos)] if v.eos in ids else ids)
    assert ours == expected
    assert [generate_ids(model, [prompt], options)[0] for prompt in prompts] == ours
    assert ours != generate_ids(model, prompts, TextOptions(max_tokens=9)), "greedy is another text"


def test_beams_end_where_a_language_model_ends_its_texts(tiny_model: Make, tmp_path: Path) -> None:
    model = tiny_model(seed=1, noise=0.15)
    model.save(tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "stock")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    v, prompts = model.vocabulary, prompts_of(model)
    options = TextOptions(beams=3, length_penalty=1.0, max_tokens=9)
    longest = max(generate_ids(model, prompts, options), key=len)
    names = {number: token for token, number in model.text_tokenizer.vocabulary().items()}
    end = longest[2]
    text = model.text_tokenizer.to_json()
    model.text_tokenizer = TextTokenizer.from_json(text, ends=[names[end]])
    ends = [v.eos, end]
    expected = []
    for prompt in prompts:
        with torch.inference_mode():
            output = theirs.generate(
                torch.tensor([prompt]),
                num_beams=3,
                max_new_tokens=9,
                do_sample=False,
                early_stopping=False,
                eos_token_id=ends,
                pad_token_id=v.pad,
                suppress_tokens=[i for i in range(v.text_size, v.size) if i != v.eos],
            )
        ids = output[0, len(prompt) :].tolist()
        expected.append(ids[: next((n for n, i in enumerate(ids) if i in ends), len(ids))])
    assert generate_ids(model, prompts, options) == expected
    assert not any(end in ids for ids in expected)


def test_beams_of_weights_that_are_not_numbers_are_an_error(tiny_model: Make) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.network.transformer.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite.*weights that are not numbers"):
        generate_ids(broken, prompts_of(broken), TextOptions(max_tokens=4, beams=3))


def test_beams_do_not_draw(model: Model) -> None:
    with pytest.raises(ValueError, match="no option beams"):
        model.draw("a red bus", beams=2, temperature=0.0)
    with pytest.raises(ValueError, match="beam search is for texts"):
        model.generate(["a red bus"], output="any", beams=2)
