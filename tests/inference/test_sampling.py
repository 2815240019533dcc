"""Which tokens are chosen: probabilities, truncation, seeds, and the penalty."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from multimodal.api import Model
from multimodal.inference.sampling import NOTHING, choose, generators, penalise, truncate
from multimodal.inference.text import generate_ids
from multimodal.options import Sampling, TextOptions
from tests.prompts import prompts_of

Make = Callable[..., Model]
HOT = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


def picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(4000, 3)
    chosen = choose(logits, HOT, generators(HOT, range(4000)))
    shares = torch.bincount(chosen, minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (1 - 2**-53, 3)])
def test_a_token_of_probability_0_is_never_chosen(
    share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rand(shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, share, dtype=dtype)

    monkeypatch.setattr(torch, "rand", rand)
    never = -torch.inf
    for scores in ([never, 0.0, never, 1.0, never], [never, 5.0, 2.0, 0.1, never]):
        chosen = choose(torch.tensor([[scores] * 2]), HOT, generators(HOT, [0]))
        assert chosen.tolist() == [[expected] * 2]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_an_error(broken: float) -> None:
    with pytest.raises(ValueError, match="logits are not finite"):
        choose(torch.full((2, 5), broken), HOT, generators(HOT, range(2)))
    greedy = Sampling(temperature=0.0)
    logits = torch.tensor([[broken, broken], [-torch.inf, 1.0], [2.0, broken]])
    last = 0 if broken == -torch.inf else NOTHING
    assert choose(logits, greedy, generators(greedy, range(3))).tolist() == [NOTHING, 1, last]


def test_a_model_of_weights_that_are_not_numbers_says_so(tiny_model: Make) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.network.transformer.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite.*weights that are not numbers"):
        generate_ids(broken, prompts_of(broken), TextOptions(max_tokens=4))
    for method, words in (("causal", "logits are not finite"), ("masked", "codes from -1 to -1")):
        with pytest.raises(ValueError, match=words):
            broken.draw("a red bus", method=method, temperature=0.0)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 3, "top_p": 0.9}, {0, 1, 2}),
    ],
)
def test_truncation_leaves_these_tokens(options: dict[str, float], left: set[int]) -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    truncated = truncate(logits, Sampling(temperature=1.0, **options))  # type: ignore[arg-type]
    assert set(torch.isfinite(truncated[0]).nonzero().flatten().tolist()) == left


def test_min_p_leaves_tokens_that_are_likely_enough() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    finite = truncate(logits, Sampling(temperature=1.0, min_p=0.31)).isfinite()
    assert finite.tolist() == [[True, True, False, False]]
    assert truncate(logits, Sampling(temperature=1.0, min_p=1.0)).isfinite().sum() == 1


def test_the_penalty_falls_on_the_tokens_of_the_same_text_alone(model: Model) -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    penalised = penalise(logits, [[0, 1, 1], []], 2.0)
    assert penalised.tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]]
    plain = generate_ids(model, prompts_of(model), TextOptions(max_tokens=20))
    options = TextOptions(repetition_penalty=50.0, max_tokens=20)
    varied = generate_ids(model, prompts_of(model), options)
    assert any(len(set(text)) < len(text) for text in plain)
    assert all(len(set(text)) == len(text) for text in varied)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_penalty_of_many_rows_is_that_of_each(transposed: bool) -> None:
    """To the bit, and the logits that were given stay."""
    torch.manual_seed(0)
    logits = torch.randn(9, 5).T if transposed else torch.randn(5, 9)
    before, texts = logits.clone(), [[8, 8, 0], [], [3], list(range(9)), [0]]
    penalised = penalise(logits, texts, 1.7)
    for row, text, result in zip(before, texts, penalised, strict=True):
        scored = [s / 1.7 if s > 0 else s * 1.7 for s in row]
        expected = [scored[i] if i in text else s for i, s in enumerate(row)]
        assert torch.equal(result, torch.stack(expected))
    assert torch.equal(logits, before)


def test_a_row_is_the_same_in_any_batch(model: Model) -> None:
    v = model.vocabulary
    prompts = [[v.bos, *model.text_tokenizer.encode(text)] for text in ("a red", "two", "the cat")]
    hot = TextOptions(temperature=1.0, seed=5, max_tokens=9)
    together = generate_ids(model, prompts, hot)
    alone = [generate_ids(model, [p], hot, [i])[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together != generate_ids(model, prompts, replace(hot, seed=6))
    images = [picture(i) for i in range(3)]
    captions = model.caption(images, max_tokens=9, temperature=1.0)
    assert captions == model.caption(images, max_tokens=9, temperature=1.0, batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_sampling_is_refused(
    model: Model, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.caption([picture()], **options)  # type: ignore[arg-type]
