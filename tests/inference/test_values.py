"""Images in every form that people hold, one or many in, and what comes back for many."""

import base64
import functools
import http.server
import io
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multimodal.api import Model, load
from multimodal.inference.values import MAX_DOWNLOAD, Drawings, Results, open_mask, open_source
from multimodal.options import DrawOptions, TextOptions, make_options

Make = Callable[..., Model]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


@pytest.fixture(scope="module")
def model(tiny_model: Make) -> Model:
    return tiny_model(noise=0.1)


def png(image: Image.Image = PICTURE) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_form_of_an_image_is_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    channels_first = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)
    with path.open("rb") as file:
        forms = [str(path), path, png(), bytearray(png()), memoryview(png()), io.BytesIO(png())]
        forms += [file, PICTURE, PIXELS, PIXELS / 255, PIXELS.astype(np.float32) / 255]
        forms += [channels_first, channels_first / 255, (channels_first / 255).requires_grad_()]
        for form in forms:
            assert (np.asarray(open_source(form)) == PIXELS).all(), type(form)
    grey = PIXELS[:, :, 0]
    for form in (grey, grey[:, :, None], torch.from_numpy(grey.copy())[None]):
        assert (np.asarray(open_source(form)) == grey[:, :, None]).all()
    clear = np.dstack([PIXELS, np.zeros((6, 5), np.uint8)])
    assert (np.asarray(open_source(clear)) == 255).all(), "transparent is white"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "int is no image; expected a path"),
        (None, "NoneType is no image"),
        (io.StringIO("x"), "open it with mode 'rb'"),
        (PIXELS.astype(np.int64), r"shape \[6, 5, 3\] and type int64; expected uint8"),
        (PIXELS.astype(float), r"values outside \[0, 1\]"),
        (np.full((4, 4), np.nan), r"values outside \[0, 1\]"),
        (torch.randn(3, 4, 4), r"values outside \[0, 1\]"),
        (PIXELS.transpose(2, 0, 1), r"expected \[H, W\] or \[H, W, C\] with 1 to 4"),
        (torch.from_numpy(PIXELS.copy()), r"expected \[H, W\] or \[C, H, W\]"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (str(Path(__file__).parent), r"is a folder: give a list of its images, as in sorted\(Path"),
        (Path(__file__).parent, "is a folder: give a list"),
        ("http://localhost/a.png", "not fetched unless that is asked for"),
    ],
)
def test_what_is_no_image_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(source)


def test_masks_of_ones_are_white() -> None:
    ones = np.eye(4, dtype=np.uint8)
    expected = np.asarray(open_mask(Image.fromarray(ones * 255)))
    for mask in (ones, ones.astype(bool), ones.astype(np.int64), ones * 255, ones.astype(float)):
        assert (np.asarray(open_mask(mask)) == expected).all()
        assert (np.asarray(open_mask(torch.from_numpy(mask)[None])) == expected).all()


def test_web_addresses_are_fetched_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_DOWNLOAD + 1)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert (np.asarray(open_source(f"{address}/a.png", urls=True)) == PIXELS).all()
        with pytest.raises(ValueError, match="b.png: could not be fetched .*404"):
            open_source(f"{address}/b.png", urls=True)
        with pytest.raises(ValueError, match="more than 64 MiB"):
            open_source(f"{address}/large.png", urls=True)
        server.shutdown()


class Strange(http.server.BaseHTTPRequestHandler):
    """Answers that no image comes of."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(png())
        elif self.path.startswith("/announces/"):
            self.send_response(200)
            self.send_header("Content-Length", self.path.removeprefix("/announces/"))
            self.end_headers()
        elif self.path == "/chunk":
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"f" * 30 + b"\r\n" + png())
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            self.drip()
        elif self.path == "/headers":
            self.send_response(200)
            self.send_header("X-Long", "")
            self.flush_headers()
            self.drip()
            self.end_headers()
        else:
            self.wfile.write(b"HI\r\n\r\n")

    def drip(self) -> None:
        """Something after each wait, which is shorter than any limit, for over a second."""
        with suppress(OSError):
            for _ in range(30):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)

    def log_message(self, *_: Any) -> None:
        pass


def test_what_a_web_address_may_do_wrong_is_one_line(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multimodal.inference.values.LONGEST_DOWNLOAD", 0.5)
    monkeypatch.setattr(model, "urls", True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        start = f"http://127.0.0.1:{server.server_port}"
        wrong = [f"{start}/{end}" for end in (
            "to/ftp://127.0.0.1/a.png", "to/file:///etc/hostname", "short", "slow", "headers",
            "strange", "a b", "announces/30000000000", f"announces/{'9' * 30}", "chunk",
            f"to/http://127.0.0.1:{'9' * 50}/a.png",
        )]  # fmt: skip
        wrong += ["http://127.0.0.1:99999999/a.png", "http://[::1/a.png", "http:///a.png"]
        results = model.caption([*wrong, PICTURE], max_tokens=2, on_error="skip")
        server.shutdown()
    assert [result is None for result in results] == [True] * len(wrong) + [False]
    for number, address in enumerate(wrong):
        error = str(results.skipped[number])
        assert error.startswith(f"{address}: could not be fetched (")
        if address.endswith(("/slow", "/headers")):
            assert "it took more than 0.5 seconds" in error


def test_one_in_is_one_out(model: Model) -> None:
    several = model.caption([PICTURE, PIXELS], max_tokens=5)
    assert model.caption(PICTURE, max_tokens=5) == several[0] == several[1]
    assert model.caption(np.stack([PIXELS, PIXELS]), max_tokens=5) == several
    assert model.caption((image for image in [PICTURE]), max_tokens=5) == several[:1]
    rows = model.embed(images=[PICTURE])
    assert torch.equal(model.embed(images=PICTURE), rows[0])
    assert torch.equal(model.embed(texts="a bus"), model.embed(texts=["a bus"])[0])


def test_one_bad_image_does_not_lose_the_others(model: Model, tmp_path: Path) -> None:
    images = [PICTURE, tmp_path / "missing.png", PICTURE, b"damaged"]
    captions = model.caption(images, max_tokens=5, on_error="skip", batch_size=3)
    good = model.caption(PICTURE, max_tokens=5)
    assert captions == [good, None, good, None]
    assert list(captions.skipped) == [1, 3] and "missing.png" in str(captions.skipped[1])
    with pytest.raises(ValueError, match="missing.png: no such file"):
        model.caption(images, max_tokens=5)
    with pytest.raises(ValueError, match="on_error='ignore': expected raise or skip"):
        model.caption(images, on_error="ignore")  # type: ignore[arg-type]


def test_answers_to_many_are_those_to_each(model: Model) -> None:
    other = Image.new("RGB", (9, 9), "red")
    ask = functools.partial(model.answer, max_tokens=4)
    questions = ["what is it?", "is it red?", "how many?"]
    assert ask(PICTURE, questions, batch_size=2) == [ask(PICTURE, each) for each in questions]
    assert ask([PICTURE, other], questions[0]) == [
        ask(each, questions[0]) for each in (PICTURE, other)
    ]
    assert ask([PICTURE, other], questions[:2]) == [
        ask(PICTURE, questions[0]),
        ask(other, questions[1]),
    ]
    assert len(model.answer([other, other], "red?", choices=["yes", "no"])) == 2
    assert ask([], "what?") == []
    with pytest.raises(ValueError, match="2 images and 3 questions"):
        ask([PICTURE, other], questions)


def test_answers_do_not_depend_on_how_many_are_asked_at_once(model: Model) -> None:
    """An image is read once, and each question has random numbers of its own."""
    ask = functools.partial(model.answer, max_tokens=8, temperature=1.0, seed=5)
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    expected = ask(PICTURE, ["what is it?"] * 7)
    assert len(set(expected)) > 4
    file.seek(0)
    assert ask(file, ["what is it?"] * 7, batch_size=3) == expected
    images = [PICTURE, PICTURE, b"damaged"]
    for act in (functools.partial(ask, question="what?"), model.embed):
        with pytest.raises(ValueError, match="image 2"):
            act(images, batch_size=2)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: m.caption({"image": PICTURE}), "images: dict is no image"),
        (lambda m: m.caption(torch.zeros(3, 4, 4, device="meta")), "a tensor without pixels"),
        (lambda m: m.caption(torch.zeros(3, 4, 4).to_sparse()), "a tensor without pixels"),
        (lambda m: m.answer(PICTURE, None), "questions: NoneType is no text"),
        (lambda m: m.answer(PICTURE, ["a", 3]), "questions: int is no text"),
        (lambda m: m.answer(PICTURE, "a", choices="yes"), "choices='yes': expected a list"),
        (lambda m: m.answer(PICTURE, "a", choices=["a", " "]), "one of them is empty"),
        (lambda m: m.answer(PICTURE, "a", choices=[1, 2]), r"choices=\[1, 2\]: expected a list"),
        (lambda m: m.draw(None), "texts: NoneType is no text"),
        (lambda m: m.embed(texts=3), "texts: int is no text"),
        (lambda m: m.edit(PICTURE, (0, 0, 2), "a"), r"box=\(0, 0, 2\): expected a list of 4, each"),
        (lambda m: m.edit(PICTURE, (0, 0, 2, 2.5), "a"), "each of it a whole number"),
        (lambda m: m.edit(PICTURE, [[True] * 5] * 6, "a"), "box=.{0,110}: expected a list of 4"),
        (lambda m: m.edit(PICTURE, (0, 0, 5, 6), None), "text=None: expected a text"),
        (lambda m: m.outpaint(PICTURE, (1, 2), "a"), r"margins=\(1, 2\): expected a list of 4"),
        (lambda m: m.vary(PICTURE, "x"), "share='x': expected a number"),
    ],
)
def test_what_cannot_be_meant_is_named(
    ask: Callable[[Any], object], message: str, model: Model
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ask(model)
    assert "\n" not in str(caught.value)


def test_drawings_of_many_texts_are_those_of_each(model: Model) -> None:
    texts = ["a red bus", "two dogs"]
    both = model.draw(texts, 2, seed=3, steps=2, method="masked")
    for text, drawings in zip(texts, both, strict=True):
        alone = model.draw(text, 2, seed=3, steps=2, method="masked")
        assert [each.tobytes() for each in drawings] == [each.tobytes() for each in alone]
    shown = Image.open(io.BytesIO(both[0]._repr_png_() or b""))
    assert shown.size == (66, 32), "a notebook shows both, two pixels apart"
    assert Drawings()._repr_png_() is None
    assert pictures_in(both) == [each.tobytes() for drawings in both for each in drawings]


def pictures_in(results: Any) -> list[bytes]:
    """The pixels of the pictures that a notebook shows of results."""
    found = re.findall(r"data:image/png;base64,([^']+)'", results._repr_html_())
    return [Image.open(io.BytesIO(base64.b64decode(data))).tobytes() for data in found]


def test_a_notebook_shows_results_and_nothing_of_them_is_markup(tmp_path: Path) -> None:
    name = tmp_path / "<b>&.png"
    PICTURE.save(name)
    found = Results([(name, 0.5), (tmp_path / "gone.png", 0.25)])
    assert pictures_in(found) == [PICTURE.tobytes()]
    assert "0.500" in found._repr_html_() and "&lt;b&gt;&amp;.png" in found._repr_html_()
    texts = Results()
    for result in ("a <script>", ValueError("<x>: no image")):
        texts.add(result, "skip")
    assert texts._repr_html_().count("<") == len(
        re.findall(r"</?(?:ol|li|i)>", texts._repr_html_())
    )
    assert "a &lt;script&gt;" in texts._repr_html_() and "&lt;x&gt;: no" in texts._repr_html_()


def test_search_ranks_a_folder(model: Model, tmp_path: Path) -> None:
    for seed in range(3):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)).save(
            tmp_path / f"{seed}.png"
        )
    (tmp_path / "3.png").write_bytes(b"damaged")
    found = model.search(tmp_path / "1.png", tmp_path, k=2)
    assert len(found) == 2 and found[0][0] == tmp_path / "1.png"
    assert found[0][1] == pytest.approx(1, abs=1e-5) and list(found.skipped) == [3]
    paths = sorted(tmp_path.iterdir())[:3]
    scores = dict(model.search("a red bus", [str(path) for path in paths]))
    rows = model.embed(images=paths) @ model.embed(texts="a red bus")
    assert [scores[path] for path in paths] == pytest.approx(rows.tolist(), abs=1e-5)


def test_reprs_are_short(model: Model) -> None:
    assert len(repr(model).splitlines()) == 3 and "float32 on cpu" in repr(model)
    assert repr(model.text_tokenizer).startswith("TextTokenizer(")
    assert repr(model.image_tokenizer).startswith("ImageTokenizer(32 x 32 pixels, squash")


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        (TextOptions, "max_new_tokens", "max_new_tokens is max_tokens here"),
        (TextOptions, "num_beams", "num_beams is beams here"),
        (TextOptions, "temprature", "temprature is temperature here"),
        (DrawOptions, "num_inference_steps", "num_inference_steps is steps here"),
        (DrawOptions, "num_images_per_prompt", "num_images_per_prompt is n here"),
    ],
)
def test_names_of_other_libraries_lead_to_ours(options: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_options(options, {name: 1})


def test_help_says_what_an_option_does_and_types_by_their_names() -> None:
    assert "the longest text, in tokens" in (Model.caption.__doc__ or "")
    import inspect

    assert "images: ImageSource | Images" in str(inspect.signature(Model.caption))
    assert "query: ImageSource" in str(inspect.signature(Model.search))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype='bf16': expected one of auto, float32, bfloat16"),
        ({"dtype": torch.int8}, "expected one of auto, float32, bfloat16"),
        ({"device": "banana"}, "device='banana': cannot be used here"),
    ],
)
def test_a_device_or_dtype_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("starter", **options)
    assert next(load(dtype="bfloat16").network.parameters()).dtype == torch.bfloat16
