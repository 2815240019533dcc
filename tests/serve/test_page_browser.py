"""A person uses the page at ``/`` in a real browser."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene
from tests.browser import Browser, find_chromium

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is on the path"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as browser:
        yield browser


@pytest.fixture(scope="module")
def open_server(tiny_model: Callable[..., Any], serving: Any) -> Iterator[Any]:
    """It asks for no key."""
    with serving(tiny_model(noise=0.1, tied=False), keys=()) as server:
        yield server


@pytest.fixture
def page(browser: Browser, open_server: Any) -> Iterator[Browser]:
    browser.errors.clear()
    browser.open(f"http://127.0.0.1:{open_server.port}/")
    browser.wait("document.querySelector('#model').value == 'tiny'")
    yield browser
    assert browser.errors == []


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    import random

    path = tmp_path / "it's a scene.png"
    render(sample_scene(random.Random(1)), 64).save(path)
    return path


def text(page: Browser, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({selector!r}).textContent"))


def test_a_picture_is_asked_about(page: Browser, open_server: Any, scene: Path) -> None:
    from PIL import Image

    page.choose_files("#ask-file", [scene])
    page.wait("!document.querySelector('#ask-picture').hidden")
    page.click("#question")
    page.write("what is in the snow?")
    page.click("#ask .go")
    page.wait("/ s$/.test(document.querySelector('#answers .note').textContent)")
    expected = open_server.model.answer(Image.open(scene), "what is in the snow?", max_tokens=256)
    assert text(page, "#answers .text") == expected
