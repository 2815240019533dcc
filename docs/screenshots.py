"""Take the pictures of the server's page that are in docs/images.

    python -m docs.screenshots [--out docs/images]

Starts ``multimodal serve starter`` and uses its page in a headless Chromium, as a person does:
light and dark, on a desk and on a phone. The pictures asked about are scenes that are drawn here.
"""

import argparse
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene
from tests.browser import Browser, find_chromium

DESK, PHONE = (900, 720), (360, 720)
SCENES, SEED = 12, 4
COLOURS = 256  # of a saved picture


class Visitor:
    """A person at the page.

    Args:
        browser: shows it.
        url: of the page.
        out: a folder for what is seen.
    """

    def __init__(self, browser: Browser, url: str, out: Path) -> None:
        self.browser, self.url, self.out = browser, url, out

    def visit(self, tab: str, size: tuple[int, int], dark: bool = False) -> None:
        self.browser.look(*size, dark=dark)
        self.browser.open("about:blank")
        self.browser.open(f"{self.url}#{tab}")
        self.browser.wait("document.querySelector('#model').value")

    def write(self, field: str, text: str) -> None:
        self.browser.click(field)
        self.browser.evaluate(f"document.querySelector('{field}').select()")
        self.browser.write(text)

    def go(self, tab: str, result: str) -> None:
        """Press the button of a tab, and wait for a condition on its first result."""
        self.browser.click(f"#{tab} .go")
        self.browser.wait(result)

    def save(self, name: str) -> None:
        self.browser.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
        self.browser.wait("[...document.images].every(image => image.complete)")
        image = Image.open(io.BytesIO(self.browser.screenshot())).convert("RGB")
        path = self.out / f"page_{name}.png"
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {image.width} x {image.height}, {path.stat().st_size:,} bytes")


def done(results: str) -> str:
    return f"/ s$/.test(document.querySelector('#{results} .note')?.textContent)"


def visit_all(person: Visitor, scenes: list[Path]) -> None:
    browser = person.browser
    for name, size, dark in (("ask", DESK, False), ("phone", PHONE, True)):
        person.visit("ask", size, dark)
        browser.choose_files("#ask-file", scenes[:1])
        browser.wait("!document.querySelector('#ask-picture').hidden")
        for question in ("", "What colour are the rings?"):
            person.write("#question", question)
            person.go("ask", done("answers"))
        person.save(name)

    person.visit("draw", DESK, dark=True)
    browser.evaluate("document.querySelector('#seed').value = 7")
    person.write("#prompt", "a large red circle and a large blue square on a white background")
    person.go("draw", done("drawings"))
    browser.evaluate("document.querySelector('#drawings details').open = true")
    person.save("draw")

    person.visit("edit", DESK)
    browser.choose_files("#edit-file", scenes[:1])
    browser.wait("document.activeElement.id == 'brush'")
    browser.evaluate("document.querySelector('#seed').value = 2")
    browser.evaluate("document.querySelector('#brush-size').value = 42")
    browser.click("#brush")
    person.write("#change", "a large blue circle")
    person.go("edit", done("edits"))
    person.save("edit")

    person.visit("search", DESK, dark=True)
    browser.choose_files("#search-files", scenes)
    person.write("#query", "a yellow star")
    person.go("search", "document.querySelector('#found li')")
    person.save("search")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("screenshots: no Chromium or Chrome is on the path")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "multimodal", "serve", "starter", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "MULTIMODAL_API_KEY": ""})
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("screenshots: the server ended") from None
                time.sleep(0.2)
        with tempfile.TemporaryDirectory() as folder, Browser(chromium) as browser:
            rng, scenes = random.Random(SEED), []
            for number in range(SCENES):
                scenes.append(Path(folder, f"scene-{number + 1:02}.png"))
                render(sample_scene(rng), 128).save(scenes[-1])
            visit_all(Visitor(browser, f"http://127.0.0.1:{port}/", arguments.out), scenes)
            if browser.errors:
                raise SystemExit(f"screenshots: the page complained: {json.dumps(browser.errors)}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
