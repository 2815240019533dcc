"""Guidance by a schedule and away from a text, outpainting, and variations of an image."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

import multimodal.inference.editing as editing
from multimodal.api import Model
from multimodal.cli import main
from multimodal.commands.options import given_options, make_parser
from multimodal.data.images import Fit, fit_image
from multimodal.inference.codec import UNKNOWN, encode_images, read_images
from multimodal.inference.drawing import draw_codes, masked_steps
from multimodal.inference.editing import box_mask, masked_codes
from multimodal.options import DrawOptions, EditOptions

TEXTS = ["a red bus in the snow", "two dogs run"]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.15)


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("method", ["causal", "masked"])
def test_guidance_away_from_the_same_text_is_none(model: Model, method: Any) -> None:
    """u + s (c - u) with u = c. Another negative text, or none, gives another image."""

    def draw(**options: Any) -> torch.Tensor:
        return draw_codes(model, TEXTS[:1], DrawOptions(method=method, **options))

    plain = draw(guidance_scale=1)
    assert torch.equal(plain, draw(guidance_scale=4, negative=TEXTS[0]))
    away, no_negative = draw(guidance_scale=4, negative=TEXTS[1]), draw(guidance_scale=4)
    assert not torch.equal(away, no_negative) and not torch.equal(away, plain)


@pytest.mark.parametrize("method", ["causal", "masked"])
def test_a_rising_schedule_begins_without_guidance(model: Model, method: Any) -> None:
    def draw(scale: float, schedule: Any, steps: int = 4) -> torch.Tensor:
        options = DrawOptions(
            method=method, guidance_scale=scale, guidance_schedule=schedule, steps=steps
        )
        return draw_codes(model, TEXTS, options)

    plain, rising = draw(1, "constant"), draw(9, "rising")
    assert not torch.equal(rising, draw(9, "constant"))
    if method == "causal":
        assert torch.equal(rising[:, 0], plain[:, 0])  # the first code is drawn at scale 1
    else:
        assert torch.equal(draw(9, "rising", steps=1), draw(1, "constant", steps=1))
    assert torch.equal(draw(1, "rising"), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_schedule": "falling"}, "expected 'constant' or 'rising'"),
        ({"negative": "a cat", "guidance_scale": 1}, "a negative text works by guidance"),
        ({"negative": " "}, "the text is empty"),
    ],
)
def test_impossible_guidance_is_refused(
    model: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.draw("a red bus", **options)


def test_outpainting_keeps_the_image_and_draws_around_it(model: Model) -> None:
    image = picture()
    wider = model.outpaint(image, (0, 8, 40, 0), "a red bus")
    assert wider.size == (80, 32)
    assert (np.asarray(wider)[8:, :40] == np.asarray(image)).all()
    right = np.asarray(wider)[:, 44:]
    assert right.std() > 1, "not the even colour of the empty canvas"
    for margins in ((0, 0, 0, 0), (-1, 0, 9, 0)):
        with pytest.raises(ValueError, match="expected pixels from 0 on"):
            model.outpaint(image, margins, "a red bus")


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_variation_keeps_the_other_codes(
    model: Model, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    calls: list[tuple[list[str], torch.Tensor]] = []

    def spy(
        _: Any, texts: list[str], options: DrawOptions, known: torch.Tensor, numbers: list[int]
    ) -> Any:
        calls.append((texts, known))
        return masked_steps(model, texts, options, known, numbers)

    monkeypatch.setattr(editing, "masked_steps", spy)
    image = picture()
    varied = model.vary(image, share, seed=3)
    assert varied.size == image.size
    ((texts, known),) = calls
    assert texts == model.caption([image])
    codes = encode_images(model, read_images(model, [image]))
    fresh = known == UNKNOWN
    assert int(fresh.sum()) == round(16 * share)
    assert torch.equal(known[~fresh], codes[~fresh])
    kept = np.repeat(np.repeat(~fresh.reshape(4, 4).numpy(), 6, 0), 10, 1)  # 40 x 24 pixels
    before, after = np.asarray(image), np.asarray(varied)
    assert (after[kept] == before[kept]).all() and (after[~kept] != before[~kept]).any()
    other = model.vary(image, share, "two dogs", seed=4)
    assert other.tobytes() != varied.tobytes() and calls[1][0] == ["two dogs"]
    with pytest.raises(ValueError, match="share=0"):
        model.vary(image, 0)


@pytest.mark.parametrize("size", [(37, 23), (500, 333), (5, 90)])
@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
def test_a_variation_draws_its_share_of_codes_in_any_size(
    model: Model, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], fit: str
) -> None:
    drawn = []

    def spy(*arguments: Any) -> Any:
        drawn.append(int((arguments[3] == UNKNOWN).sum()))
        return masked_steps(*arguments)

    monkeypatch.setattr(editing, "masked_steps", spy)
    monkeypatch.setattr(model.image_tokenizer, "fit", fit)
    assert model.vary(picture().resize(size), 0.25, "a cat").size == size
    assert drawn == [4]


def test_the_edit_command(tiny_model_folder: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    line = ["edit", "--model", str(tiny_model_folder), str(tmp_path / "a.png")]
    line += ["--prompt", "a bus", "--out", str(tmp_path / "b.png")]
    assert main([*line, "--margins", "0,0,20,0", "--negative", "a cat"]) == 0
    assert Image.open(tmp_path / "b.png").size == (60, 24)
    assert main([*line, "--vary", "0.5", "--guidance-schedule", "rising"]) == 0
    assert Image.open(tmp_path / "b.png").size == (40, 24)
    assert main([*line, "--vary", "2"]) == 1


def test_a_thin_mask_touches_its_codes(model: Model) -> None:
    thin = box_mask((1024, 1024), (255, 100, 257, 400))  # two pixels, on both sides of a border
    codes = masked_codes(thin, "squash", 32, 4).reshape(4, 4)
    assert codes.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    edge = box_mask((500, 250), (0, 0, 1, 1))
    assert masked_codes(edge, "crop", 32, 4).sum() == 0
    assert masked_codes(edge, "letterbox", 32, 4).any()


@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
def test_the_codes_under_a_pixel_are_those_where_a_change_of_it_shows(fit: Fit) -> None:
    """As the square of ``fit_image`` shows it, which is compared before and after the change.

    The most changed pixel is under a drawn code, and every drawn code has changed. Resampling
    reads up to three pixels (of the coarser grid) around: beyond a mask so much wider nothing has.
    """
    rng = np.random.default_rng(0)
    cases = [((21, 216), (10, 40), 64, 8)]  # the letterbox rounds 6.2 pixels to 6
    for _ in range(300):
        width, height = (int(side) for side in rng.integers(8, 160, 2))
        place = int(rng.integers(width)), int(rng.integers(height))
        cases.append(((width, height), place, *[(32, 4), (64, 8), (128, 16)][rng.integers(3)]))
    shown = 0
    for size, (x, y), side, grid in cases:
        plain = Image.new("RGB", size, (100, 100, 100))
        changed = plain.copy()
        changed.putpixel((x, y), (255, 255, 255))
        squares = [np.asarray(fit_image(image, side, fit), np.int64) for image in (plain, changed)]
        change = abs(squares[1] - squares[0]).sum(-1)
        change = rearrange(change, "(h i) (w j) -> h w (i j)", h=grid, w=grid).max(-1).flatten()
        reach = int(3 * max(1, max(size) / side))
        wide = Image.new("L", size)
        wide.paste(255, (max(0, x - reach), max(0, y - reach), x + reach + 1, y + reach + 1))
        drawn, near = (
            masked_codes(mask, fit, side, grid).numpy()
            for mask in (box_mask(size, (x, y, x + 1, y + 1)), wide)
        )
        shown += drawn.any()
        assert not drawn.any() or change[drawn].max() == change.max(), (size, x, y)
        assert (change[drawn] > 0).all() and not change[~near].any(), (size, x, y)
    assert shown > 150


def test_a_long_image_takes_no_memory_of_a_square() -> None:
    mask = box_mask((14_100, 71), (10_000, 0, 10_001, 1))
    tracemalloc.start()
    assert masked_codes(mask, "letterbox", 256, 16).nonzero().tolist() == [[16 * 7 + 11]]
    assert tracemalloc.get_traced_memory()[1] < 4 * mask.width * mask.height
    tracemalloc.stop()


def test_pixels_outside_a_crop_are_left_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.image_tokenizer, "fit", "crop")
    image = picture()  # 40 x 24: the outer 8 columns are not seen
    varied = np.asarray(model.vary(image, 1.0, "a red bus"))
    assert (varied[:, :8] == np.asarray(image)[:, :8]).all()
    assert (varied[:, 8:32] != np.asarray(image)[:, 8:32]).any()
    with pytest.raises(ValueError, match="cannot draw around it"):
        model.outpaint(image, (0, 0, 40, 0), "a red bus")


@pytest.mark.parametrize("options", [DrawOptions, EditOptions])
def test_the_command_line_draws_at_the_same_temperature(options: type[EditOptions]) -> None:
    parser = make_parser("draw", "", "", options)
    assert given_options(parser.parse_args([]), options) == {}, "defaults are those of the class"
    assert options().temperature == 0.8 and "(default 0.8)" in parser.format_help()
