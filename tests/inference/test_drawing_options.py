"""Guidance by schedule and away from a text; what lies around an image; variations of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import multimodal.inference.editing as editing
from multimodal.api import Model
from multimodal.cli import main
from multimodal.commands.options import DRAWN_AT
from multimodal.inference.drawing import DRAWN, UNKNOWN, draw_codes
from multimodal.inference.text import encode_images, read_images

TEXTS = ["a red bus in the snow", "two dogs run"]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(noise=0.15)


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("method", ["causal", "masked"])
def test_led_away_from_itself_is_no_guidance(model: Model, method: Any) -> None:
    """u + s (c - u) with u = c; and another text, or none, leads elsewhere."""
    plain = draw_codes(model, TEXTS[:1], method=method, guidance_scale=1)
    itself = draw_codes(model, TEXTS[:1], method=method, guidance_scale=4, negative=TEXTS[0])
    assert torch.equal(plain, itself)
    away = draw_codes(model, TEXTS[:1], method=method, guidance_scale=4, negative=TEXTS[1])
    none = draw_codes(model, TEXTS[:1], method=method, guidance_scale=4)
    assert not torch.equal(away, none) and not torch.equal(away, plain)


@pytest.mark.parametrize("method", ["causal", "masked"])
def test_a_rising_schedule_begins_without_guidance(model: Model, method: Any) -> None:
    def drawn(scale: float, schedule: Any, steps: int = 4) -> torch.Tensor:
        return draw_codes(model, TEXTS, method=method, guidance_scale=scale,
                          guidance_schedule=schedule, steps=steps)  # fmt: skip

    plain, rising = drawn(1, "constant"), drawn(9, "rising")
    assert not torch.equal(rising, drawn(9, "constant"))
    if method == "causal":
        assert torch.equal(rising[:, 0], plain[:, 0])  # the first code is drawn at scale 1
    else:
        assert torch.equal(drawn(9, "rising", steps=1), drawn(1, "constant", steps=1))
    assert torch.equal(drawn(1, "rising"), plain)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guidance_schedule": "falling"}, "expected constant or rising"),
        ({"negative": "a cat", "guidance_scale": 1}, "a negative text works by guidance"),
        ({"negative": " "}, "the text is empty"),
    ],
)
def test_guidance_that_cannot_be(model: Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model.draw("a red bus", **options)


def test_around_an_image_all_else_is_drawn(model: Model) -> None:
    image = picture()
    wider = model.outpaint(image, (0, 8, 40, 0), "a red bus")
    assert wider.size == (80, 32)
    assert (np.asarray(wider)[8:, :40] == np.asarray(image)).all()
    right = np.asarray(wider)[:, 44:]
    assert right.std() > 1, "not the even ground it was laid on"
    for margins in ((0, 0, 0, 0), (-1, 0, 9, 0)):
        with pytest.raises(ValueError, match="expected pixels from 0 on"):
            model.outpaint(image, margins, "a red bus")


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_variation_keeps_the_other_codes(
    model: Model, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    asked: list[tuple[list[str], torch.Tensor]] = []

    def look(_: Any, texts: list[str], *, known: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append((texts, known))
        return draw_codes(model, texts, known=known, **options)

    monkeypatch.setattr(editing, "draw_codes", look)
    image = picture()
    varied = model.vary(image, share, seed=3)
    assert varied.size == image.size
    ((texts, known),) = asked
    assert texts == model.caption([image])
    codes = encode_images(model, read_images(model, [image]))
    fresh = known == UNKNOWN
    assert int(fresh.sum()) == round(16 * share)
    assert torch.equal(known[~fresh], codes[~fresh])
    other = model.vary(image, share, "two dogs", seed=4)
    assert other.tobytes() != varied.tobytes() and asked[1][0] == ["two dogs"]
    with pytest.raises(ValueError, match="share=0"):
        model.vary(image, 0)


def test_the_commands(tiny_model_folder: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    line = ["edit", "--model", str(tiny_model_folder), str(tmp_path / "a.png"), "--prompt", "a bus",
            "--out", str(tmp_path / "b.png")]  # fmt: skip
    assert main([*line, "--margins", "0,0,20,0", "--negative", "a cat"]) == 0
    assert Image.open(tmp_path / "b.png").size == (60, 24)
    assert main([*line, "--vary", "0.5", "--guidance-schedule", "rising"]) == 0
    assert Image.open(tmp_path / "b.png").size == (40, 24)
    assert main([*line, "--vary", "2"]) == 1


def test_a_thin_mask_touches_its_codes(model: Model) -> None:
    from multimodal.inference.editing import box_mask, masked_codes

    thin = box_mask((1024, 1024), (255, 100, 257, 400))  # two pixels, on both sides of a border
    found = masked_codes(thin, "squash", 4).reshape(4, 4)
    assert found.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    edge = box_mask((500, 250), (0, 0, 1, 1))
    assert masked_codes(edge, "crop", 4).sum() == 0 and masked_codes(edge, "letterbox", 4).any()


def test_what_a_crop_leaves_out_is_left_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    config = dataclasses.replace(model.image_tokenizer.config, fit="crop")
    monkeypatch.setattr(model.image_tokenizer, "config", config)
    image = picture()  # 40 x 24: the outer 8 columns are not seen
    varied = np.asarray(model.vary(image, 1.0, "a red bus"))
    assert (varied[:, :8] == np.asarray(image)[:, :8]).all()
    assert (varied[:, 8:32] != np.asarray(image)[:, 8:32]).any()
    with pytest.raises(ValueError, match="cannot draw around it"):
        model.outpaint(image, (0, 0, 40, 0), "a red bus")


def test_the_command_line_draws_at_the_same_temperature() -> None:
    assert DRAWN_AT == DRAWN.temperature
