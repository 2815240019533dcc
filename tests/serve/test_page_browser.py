"""A person uses the page at ``/`` in a real browser."""

import base64
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene
from tests.browser import Browser, find_chromium

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is on the path"),
]
QUESTION = "what's in the `snow` of $HOME?"
DONE = "/ s$/.test(document.querySelector('#%s .note')?.textContent)"


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
    browser.look(800, 900)
    browser.open("about:blank")  # else another tab of the page would be no new page
    browser.open(f"http://127.0.0.1:{open_server.port}/")
    browser.wait("document.querySelector('#model').value == 'tiny'")
    yield browser
    assert browser.errors == []


@pytest.fixture
def scenes(tmp_path: Path) -> list[Path]:
    """Pictures, the first of which has a name that shells must quote."""
    rng, names = random.Random(1), ('it\'s a "scene".png', "b.png", "c.jpg", "d.webp")
    paths = [tmp_path / name for name in names]
    for path in paths:
        render(sample_scene(rng), 64).save(path)
    return paths


def text(page: Browser, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def set_option(page: Browser, **values: float) -> None:
    for name, value in values.items():
        page.evaluate(f"document.querySelector('#{name}').value = '{value}'")


def fill(page: Browser, field: str, words: str) -> None:
    page.click(field)
    page.evaluate(f"document.querySelector('{field}').select()")
    page.write(words)


def codes(page: Browser, results: str) -> list[str]:
    """The commands below the first result: curl, Python, and so on."""
    page.evaluate(f"document.querySelectorAll('{results} details').forEach(d => d.open = true)")
    page.wait(f"document.querySelector('{results} pre')")
    found: list[str] = page.evaluate(
        f"[...document.querySelectorAll('{results} pre')].map(pre => pre.textContent)"
    )
    return found


def run_python(program: str, folder: Path) -> str:
    """What the program prints, run in a folder."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(program, {})  # code of our page
    return printed.getvalue()


def run_shell(command: str, folder: Path) -> str:
    """What the command prints, run in a folder, with a jq that does what our commands need."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    (folder / "bin").mkdir(exist_ok=True)
    program = "import json, sys; print(json.load(sys.stdin)['data'][0]['b64_json'])"
    (folder / "bin/jq").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    (folder / "bin/jq").chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    how: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 60}
    return subprocess.run(
        ["sh", "-c", command], cwd=folder, env={**os.environ, "PATH": path}, **how
    ).stdout


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_picture_is_asked_about(page: Browser, open_server: Any, scenes: list[Path]) -> None:
    page.choose_files("#ask-file", scenes[:1])
    page.wait("!document.querySelector('#ask-picture').hidden")
    fill(page, "#question", QUESTION)
    page.key("Enter")
    page.wait(DONE % "answers")
    image = Image.open(scenes[0])
    expected = open_server.model.answer(image, QUESTION, max_tokens=256)
    assert text(page, "#answers .text") == expected != ""
    assert text(page, "#said").strip() in expected  # its end, for screen readers
    curl, python = codes(page, "#answers")
    assert run_python(python, scenes[0].parent) == expected
    events = run_shell(curl, scenes[0].parent).split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    pieces = [choice["delta"].get("content", "") for c in chunks for choice in c["choices"]]
    assert "".join(pieces) == expected


def test_a_drawing_grows(page: Browser, open_server: Any, tmp_path: Path) -> None:
    page.click("#draw-tab")
    set_option(page, seed=3, guidance_scale=2)
    fill(page, "#prompt", "a red bus")
    page.evaluate(
        "window.seen = new Set(); new MutationObserver(() => document.querySelectorAll("
        "'#drawings img').forEach(image => image.src && seen.add(image.src))).observe("
        "document.querySelector('#drawings'), {subtree: true, childList: true, attributes: true})"
    )
    page.click("#draw .go")
    page.wait(DONE % "drawings")
    (expected,) = open_server.model.draw("a red bus", 1, seed=3, guidance_scale=2.0)
    drawn = opened(page.evaluate("document.querySelector('#drawings img').src"))
    assert drawn.tobytes() == expected.tobytes()
    assert page.evaluate("seen.size") == 4, "three previews, and the drawing"
    curl, python = codes(page, "#drawings")
    run_python(python, tmp_path)
    assert Image.open(tmp_path / "drawing.png").tobytes() == expected.tobytes()
    (tmp_path / "drawing.png").unlink()
    run_shell(curl, tmp_path)
    assert Image.open(tmp_path / "drawing.png").tobytes() == expected.tobytes()
    # The drawing can be edited, as if it had been chosen.
    page.evaluate(
        "[...document.querySelectorAll('#drawings button')].find("
        "button => button.textContent == 'Edit it').click()"
    )
    page.wait("document.activeElement.id == 'brush'")
    assert text(page, "[aria-selected=true]") == "Edit"


def test_pictures_are_dropped_and_pasted(page: Browser, scenes: list[Path]) -> None:
    shown = "document.querySelector('#ask-picture').alt"
    page.drop("#ask", scenes[1:2])
    page.wait(f"{shown} == 'b.png'")
    page.evaluate(
        "const data = new DataTransfer(); const canvas = document.createElement('canvas');"
        "canvas.toBlob(blob => { data.items.add(new File([blob], 'pasted.png', {type: blob.type}));"
        "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data})); })"
    )
    page.wait(f"{shown} == 'pasted.png'")
    page.click("#search-tab")
    (scenes[0].parent / "deeper").mkdir()
    scenes[3].rename(scenes[0].parent / "deeper/d.webp")
    (scenes[0].parent / "notes.txt").write_text("no picture")
    page.drop("#search", [scenes[0].parent])
    page.wait("document.querySelector('#chosen').textContent == '4 pictures.'")


def test_what_is_painted_is_drawn_anew(page: Browser, open_server: Any, scenes: list[Path]) -> None:
    page.click("#edit-tab")
    page.choose_files("#edit-file", scenes[:1])
    page.wait("!document.querySelector('#easel').hidden")
    set_option(page, seed=5, steps=3)
    fill(page, "#change", "a red bus")
    page.click("#edit .go")
    assert "Paint" in page.wait("document.querySelector('#edit .error').textContent")
    page.mouse("mousePressed", *page.place("#brush", 0.2, 0.2))
    page.mouse("mouseMoved", *page.place("#brush", 0.4, 0.2))
    page.mouse("mouseReleased", *page.place("#brush", 0.4, 0.2))
    page.click("#edit .go")
    page.wait(DONE % "edits")
    brush = opened(page.evaluate("document.querySelector('#brush').toDataURL()"))
    mask = brush.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0)
    assert mask.size == (64, 64) and np.asarray(mask)[13, 13:25].all()
    image = Image.open(scenes[0])
    expected = open_server.model.edit(image, mask, "a red bus", seed=5, steps=3)
    edited = opened(page.evaluate("document.querySelector('#edits img').src"))
    assert edited.tobytes() == expected.tobytes()
    assert np.asarray(edited)[40:].tobytes() == np.asarray(image.convert("RGB"))[40:].tobytes()
    mask_file = Image.new("RGBA", mask.size)
    mask_file.putalpha(mask.point(lambda value: 255 - value))
    mask_file.save(scenes[0].parent / "mask.png")
    curl, python = codes(page, "#edits")
    saved = scenes[0].parent / "drawing.png"
    for run, code in ((run_python, python), (run_shell, curl)):
        run(code, scenes[0].parent)
        assert Image.open(saved).tobytes() == expected.tobytes()
        saved.unlink()


def test_the_brush_is_moved_with_the_keyboard(page: Browser, scenes: list[Path]) -> None:
    page.click("#edit-tab")
    page.choose_files("#edit-file", scenes[:1])
    page.wait("document.activeElement.id == 'brush'")
    for key in ("ArrowLeft", "ArrowDown", " "):
        page.key(key)
    brush = opened(page.evaluate("document.querySelector('#brush').toDataURL()"))
    rows, columns = np.nonzero(np.asarray(brush.getchannel("A")))
    assert abs(columns.mean() - 64 * 0.45) < 1 and abs(rows.mean() - 64 * 0.55) < 1
    assert "45 % from the left, 55 % from the top" in text(page, "#said")


def test_pictures_are_ranked(page: Browser, open_server: Any, scenes: list[Path]) -> None:
    page.click("#search-tab")
    broken = scenes[0].parent / "broken.png"
    broken.write_bytes(b"no picture")
    page.choose_files("#search-files", [*scenes, broken])
    fill(page, "#query", "a red bus")
    page.click("#search .go")
    page.wait("document.querySelector('#found li')")
    names = page.evaluate(
        "[...document.querySelectorAll('#found figcaption')].map(e => e.lastChild.data.trim())"
    )
    model = open_server.model
    rows = model.embed(images=[Image.open(path) for path in scenes])
    scores = (rows @ model.embed(texts=["a red bus"])[0]).tolist()
    order = sorted(range(len(scenes)), key=lambda number: -scores[number])
    assert names == [scenes[number].name for number in order]
    assert "1 cannot be read: broken.png" in text(page, "#chosen")
    page.errors.clear()  # the console notes the status 400
    curl, python, _, of_picture = codes(page, "#found")
    shown = json.loads(run_python(python, scenes[0].parent))
    assert shown == pytest.approx(model.embed(texts=["a red bus"])[0].tolist(), abs=1e-6)
    shown = json.loads(run_python(of_picture, scenes[0].parent))
    assert shown == pytest.approx(rows[order[0]].tolist(), abs=1e-6)
    answer = json.loads(run_shell(curl, scenes[0].parent))
    assert len(answer["data"][0]["embedding"]) == len(shown)


def test_a_lost_connection_is_no_fault_of_the_pictures(page: Browser, scenes: list[Path]) -> None:
    page.click("#search-tab")
    page.choose_files("#search-files", scenes)
    fill(page, "#query", "a red bus")
    page.evaluate(
        "window.kept = fetch; window.fetch = () => Promise.reject(new TypeError('network'))"
    )
    page.click("#search .go")
    page.wait("/cannot be reached/.test(document.querySelector('#search .error').textContent)")
    assert text(page, "#chosen") == "4 pictures."
    page.evaluate("window.fetch = window.kept")
    page.click("#search .go")
    page.wait("document.querySelectorAll('#found li').length == 4")


def test_a_request_is_stopped(page: Browser, open_server: Any) -> None:
    set_option(page, max_tokens=1024)
    fill(page, "#question", "what?")
    page.click("#ask .go")
    page.wait("!document.querySelector('#ask .stop').hidden")
    page.key("Escape")
    page.wait(DONE % "answers")
    assert "stopped" in text(page, "#answers .note")
    assert text(page, "#ask .error") == ""
    deadline = time.monotonic() + 20
    while open_server.engines.scheduler.jobs:  # its row leaves the batch
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_errors_are_told_in_words(page: Browser) -> None:
    fill(page, "#question", "")
    page.click("#ask .go")
    assert "picture" in page.wait("document.querySelector('#ask .error').textContent")
    fill(page, "#question", "what?")
    set_option(page, max_tokens=5000)
    page.click("#ask .go")
    page.wait("/at most 1024/.test(document.querySelector('#ask .error').textContent)")
    assert text(page, "#answers .note").startswith("failed")
    page.errors.clear()  # the console notes the status 400
    set_option(page, temperature=-1, steps=-1)  # a drawing has steps, an answer has none
    page.click("#ask .go")
    page.wait("/out of range: Temperature/.test(document.querySelector('#ask .error').textContent)")
    page.evaluate("window.fetch = () => Promise.reject(new TypeError('network'))")
    set_option(page, temperature=1, max_tokens=9)
    page.click("#ask .go")
    page.wait("/cannot be reached/.test(document.querySelector('#ask .error').textContent)")


def test_a_server_with_a_key_asks_for_it(
    browser: Browser, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.open("about:blank")
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.wait("document.activeElement.id == 'key'")
    for key, shown in (("wrong", False), ("sk-test", True)):
        browser.wait("!document.querySelector('#keys').hidden")
        browser.click("#key")
        browser.write(key)
        browser.key("Enter")
        if shown:
            browser.wait("document.querySelector('#keys').hidden")
            browser.wait("document.querySelector('#model').value == 'tiny'")
        else:
            browser.wait("document.querySelector('#key').value == ''")
    fill(browser, "#question", "what?")
    browser.key("Enter")
    browser.wait(DONE % "answers")
    curl, python = codes(browser, "#answers")
    assert "sk-test" not in curl + python
    monkeypatch.setenv("MULTIMODAL_API_KEY", "sk-test")
    assert run_python(python, tmp_path).strip() == text(browser, "#answers .text").strip()


def test_the_tabs_are_used_with_the_keyboard(page: Browser) -> None:
    page.evaluate("document.querySelector('#ask-tab').focus()")
    for name in ("draw", "edit", "search", "ask"):
        page.key("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"{name}-tab"
        shown = "[...document.querySelectorAll('[role=tabpanel]')].filter(p => !p.hidden)"
        assert page.evaluate(f"{shown}.map(panel => panel.id)") == [name]
        assert page.evaluate("location.hash") == f"#{name}"


@pytest.mark.parametrize("tab", ["ask", "draw", "edit", "search"])
def test_a_phone_and_a_screen_reader_have_all(page: Browser, tab: str) -> None:
    page.look(360, 740)
    page.click(f"#{tab}-tab")
    page.evaluate("document.querySelector('#settings').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    controls = {"button", "textbox", "combobox", "spinbutton", "slider", "tab", "tabpanel"}
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if node.get("role", {}).get("value") in controls
    ]
    assert len(found) > 8
    assert [role for role, name in found if not name.strip()] == []
