"""Many prompts at once, piece by piece: each as if it were alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.api import Model
from multimodal.inference.batch import DecodeBatch
from multimodal.inference.mixed import Preview, Reply, prompt_ids

Make = Callable[..., Model]


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


@pytest.fixture(scope="module")
def eager(tiny_model: Make) -> Model:
    """One that likes to draw in the middle of a text, and ends at times."""
    eager = tiny_model(seed=3, noise=0.1, tied=False)
    v, logits = eager.vocabulary, eager.network.transformer.logits

    def liking(hidden: torch.Tensor, *ids: slice) -> torch.Tensor:
        scores = logits(hidden, *ids)
        scores[..., v.boi] += 6
        scores[..., v.eos] += 3
        return scores

    eager.network.transformer.logits = liking  # type: ignore[method-assign]
    return eager


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def prompts() -> list[list[str | Image.Image]]:
    return [["a red"], [picture(0), "is it"], [picture(1), "a", picture(2)], [picture(3)]]


def same(one: Reply | ValueError, other: Reply | ValueError) -> bool:
    assert isinstance(one, Reply) and isinstance(other, Reply)
    counts = ("prompt_tokens", "text_tokens", "image_tokens", "ended")
    assert one.log_probability == pytest.approx(other.log_probability, abs=1e-2)
    return all(getattr(one, name) == getattr(other, name) for name in counts) and [
        part if isinstance(part, str) else part.tobytes() for part in one.parts
    ] == [part if isinstance(part, str) else part.tobytes() for part in other.parts]


@pytest.mark.parametrize("output", ["text", "image", "any"])
def test_a_batch_is_its_prompts_one_at_a_time(eager: Model, output: str) -> None:
    options = {"output": output, "max_tokens": 12}
    together = eager.reply(prompts(), **options)  # type: ignore[arg-type]
    for prompt, found in zip(prompts(), together, strict=True):
        (alone,) = eager.reply([prompt], **options)  # type: ignore[arg-type]
        assert same(found, alone)
        assert isinstance(found, Reply) and found.text_tokens <= 12
        drawn = [part for part in found.parts if isinstance(part, Image.Image)]
        assert found.image_tokens == 16 * len(drawn)
        assert all(part.size == (32, 32) for part in drawn)
    kinds = {type(part) for one in together if isinstance(one, Reply) for part in one.parts}
    assert (Image.Image in kinds, str in kinds) == (output != "text", output != "image")


def test_random_numbers_are_those_of_the_prompt_not_of_the_batch(eager: Model) -> None:
    hot = {"temperature": 1.0, "seed": 4, "max_tokens": 12}
    together = eager.reply(prompts(), output="any", **hot)  # type: ignore[arg-type]
    again = eager.reply(prompts()[:2], output="any", **hot)  # type: ignore[arg-type]
    assert all(same(one, other) for one, other in zip(together, again, strict=False))
    other = eager.reply(prompts(), output="any", **{**hot, "seed": 5})  # type: ignore[arg-type]
    assert not all(same_parts(one, two) for one, two in zip(together, other, strict=True))


def same_parts(one: Reply | ValueError, other: Reply | ValueError) -> bool:
    assert isinstance(one, Reply) and isinstance(other, Reply)
    return [p for p in one.parts if isinstance(p, str)] == [
        p for p in other.parts if isinstance(p, str)
    ]


def test_what_is_wrong_with_one_is_not_wrong_with_the_others(model: Model, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"?")
    rows = [["a red"], [], [tmp_path / "broken.png"], ["word " * 9_999], [picture(0)]]
    found = model.reply(rows, max_tokens=9)  # type: ignore[arg-type]
    said = [str(one) if isinstance(one, ValueError) else "" for one in found]
    assert "empty" in said[1] and "broken.png" in said[2] and "reads at most" in said[3]
    good = model.reply([rows[0], rows[4]], max_tokens=9)  # type: ignore[arg-type]
    assert same(found[0], good[0]) and same(found[4], good[1])
    assert model.reply([]) == []


def test_a_stream_is_the_same_in_pieces(eager: Model) -> None:
    for prompt in prompts():
        pieces = list(eager.stream(prompt, output="any", max_tokens=12))
        parts = eager.generate(prompt, output="any", max_tokens=12)
        joined: list[str | Image.Image] = []
        for piece in pieces:
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                joined[-1] += piece
            else:
                joined.append(piece)
        assert [p.strip() if isinstance(p, str) else p.tobytes() for p in joined] == [
            p if isinstance(p, str) else p.tobytes() for p in parts
        ]
        assert not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces[:-1] if isinstance(p, str))


def test_the_probability_is_that_of_the_tokens(model: Model) -> None:
    (found,) = model.reply([["a red"]], max_tokens=7)
    assert isinstance(found, Reply)
    v, total = model.vocabulary, 0.0
    batch = DecodeBatch(model.network, [prompt_ids(model, ["a red"])], 7)
    for _ in range(found.text_tokens + (found.ended == "end")):
        allowed = torch.cat([batch.logits()[0, : v.text_size], batch.logits()[0, v.eos :][:1]])
        best = int(allowed.argmax())
        total += float(allowed.log_softmax(-1)[best])
        batch.step(torch.tensor([v.eos if best == v.text_size else best]))
    assert found.log_probability == pytest.approx(total, abs=1e-3)


def test_a_reply_and_its_stream_end_before_a_stop(model: Model) -> None:
    (whole,) = model.reply([["a red"]], max_tokens=24)
    assert isinstance(whole, Reply) and isinstance(whole.parts[0], str)
    text = whole.parts[0]
    stop = [text[6:9], "nowhere"]
    (found,) = model.reply([["a red"]], max_tokens=24, stop=stop)
    assert isinstance(found, Reply) and found.ended == "stop"
    assert found.parts == [text[: text.find(stop[0])].strip()]
    assert found.text_tokens < whole.text_tokens
    # No piece holds what is cut off, not even its beginning.
    pieces = list(model.stream(["a red"], max_tokens=24, stop=stop))
    assert "".join(map(str, pieces)).strip() == found.parts[0]


def test_an_image_can_be_watched(eager: Model) -> None:
    options = {"output": "image", "temperature": 1.0, "seed": 3}
    plain = list(eager.stream(["a red"], **options))  # type: ignore[arg-type]
    *previews, image = eager.stream(["a red"], previews=True, **options)  # type: ignore[arg-type]
    assert isinstance(image, Image.Image) and [image] == plain
    assert [one.share for one in previews if isinstance(one, Preview)] == [0.25, 0.5, 0.75]
    for number, one in enumerate(previews, start=1):
        assert isinstance(one, Preview)
        pixels = np.asarray(one.image)
        assert (pixels[8 * number :] == 128).all() and (pixels[: 8 * number] != 128).any()


@pytest.mark.parametrize(("method", "calls"), [("causal", 4), ("masked", 6)])
def test_drawings_can_be_watched(model: Model, method: str, calls: int) -> None:
    seen: list[tuple[list[int], list[Image.Image]]] = []
    how = {"method": method, "steps": 6, "seed": 1}
    drawn = model.draw(
        "a red bus", 3, on_preview=lambda n, images: seen.append((list(n), images)), **how
    )  # type: ignore[arg-type]
    assert drawn == model.draw("a red bus", 3, **how)  # type: ignore[arg-type]
    assert [numbers for numbers, _ in seen] == [[0, 1, 2]] * calls
    assert seen[-1][1] == drawn and seen[0][1] != drawn
    with pytest.raises(ValueError, match="nothing to see before the end"):
        model.draw("a red bus", candidates=2, on_preview=lambda n, images: None)
