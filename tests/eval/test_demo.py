"""The demo's page is complete, needs no other file, and shows what the model did."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.eval.demo import PHOTOS, Demo, photo
from multimodal.eval.page import Figure, Section, page


class Reader(HTMLParser):
    """Collects the tags, texts and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def open_data(address: str) -> Image.Image:
    head, data = address.split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_the_demo_writes_one_complete_page(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["demo", "--model", str(tiny_model_folder), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out)
    reader = Reader(out.read_text("utf-8"))
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert len(reader.addresses) > 50
    assert all(min(open_data(address).size) >= 32 for address in reader.addresses)
    text = " ".join(reader.texts)
    for title in ("Captions", "Answers", "What the model sees", "Drawings", "An edit", "Search"):
        assert title in text
    model = load(tiny_model_folder)
    assert model.fingerprint in text
    demo = Demo(model)
    captions = model.caption([*demo.pictures[:8], *(photo(name) for name in PHOTOS)])
    for caption in captions:
        assert " ".join(caption.split()) in " ".join(text.split())
    assert re.search(r"\d+ of 8 are right", text)


def test_verdicts_are_right(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Demo(load(tiny_model_folder))
    scenes, first = demo.scenes, demo.scenes[0].objects[0]
    captions = [f"a {first.colour} {first.shape}", *["a dog"] * (7 + len(PHOTOS))]
    monkeypatch.setattr(Model, "caption", lambda *_: captions)
    figures = demo.captions().rows[0][1]
    assert [figure.verdict for figure in figures] == [True, *[False] * 7]
    monkeypatch.setattr(Model, "answer", lambda *_: "yes")
    ((line, answers),) = demo.answers().rows
    right = sum(bool(figure.verdict) for figure in answers)
    assert line == f"{right} of 8 are right"
    assert all("(right:" in f.text for f in answers if not f.verdict)
    query = demo.search().rows[0]
    for figure in query[1]:
        index = next((i for i, p in enumerate(demo.pictures) if p is figure.image), None)
        shape = query[0].split()[-1]
        present = index is not None and any(o.shape == shape for o in scenes[index].objects)
        assert present or not figure.verdict


def test_text_of_a_model_is_escaped() -> None:
    image = Image.new("RGB", (8, 8))
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    text = page(evil, evil, [Section(evil, evil, [(evil, [Figure(image, evil, True)])])])
    reader = Reader(text)
    assert "script" not in reader.tags and reader.tags.count("img") == 1
    assert [a.split(",")[0] for a in reader.addresses] == ["data:image/png;base64"]


def test_a_wrong_output_is_an_error_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, message in (
        ("page.png", "expected a name that ends in .html"),
        ("no/such/page.html", "no such folder"),
    ):
        assert main(["demo", "--out", str(tmp_path / out)]) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
