"""What methods of a model take as an image, and what they return for many inputs.

Shapes: H W pixels, C channels (1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha), B images.
"""

import base64
import html
import http.client
import io
import threading
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from multimodal.data.formats.arrays import as_numpy, image_of_array
from multimodal.data.images import grid_of, open_image
from multimodal.terminal import shown

Array: TypeAlias = np.ndarray[Any, Any]
ImageSource: TypeAlias = (
    str | PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | Array | Tensor
)
Images: TypeAlias = Iterable[ImageSource] | Array | Tensor  # [B, ...]
OnError = Literal["raise", "skip"]
EXPECTED = "a path, bytes, a file, a Pillow image, a numpy array or a torch tensor"
URL_STARTS = ("http://", "https://")
MAX_DOWNLOAD = 64 << 20  # bytes of an image behind an address
CHUNK = 1 << 16  # bytes; without it read1 makes room for all that is announced
TIMEOUT, LONGEST_DOWNLOAD = 30, 300  # seconds without an answer, and in all
WEB_HANDLERS = (  # without those for files and FTP
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)
THUMBNAIL = 96  # pixels of the longer side of a picture in a notebook


def name_of(image: object, number: int) -> str:
    """What to call an image in errors."""
    return str(image) if isinstance(image, str | PathLike) else f"image {number}"


def is_one(images: object) -> bool:
    """Whether this is one image, not several. Arrays and tensors of four dimensions are several."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return isinstance(
        images, str | PathLike | bytes | bytearray | memoryview | Image.Image
    ) or hasattr(images, "read")


def to_list(images: ImageSource | Images, what: str = "images") -> list[Any]:
    """One image as a list of one, several as a list."""
    if is_one(images):
        return [images]
    try:
        if isinstance(images, Mapping):
            raise TypeError("its keys are no images")
        return list(images)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(
            f"{what}: {type(images).__name__} is no image; expected {EXPECTED}, or a list of them"
        ) from error


def to_texts(texts: str | Sequence[str], what: str = "texts") -> list[str]:
    """One text as a list of one, several as a list.

    Raises:
        ValueError: for what is no text.
    """
    several = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    for text in several:
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"{what}: {kind} is no text; expected a text, or a list of texts")
    return several


def open_source(source: Any, name: str | None = None, urls: bool = False) -> Image.Image:
    """An image as Pillow has it, in mode RGB.

    Args:
        source: a numpy array [H, W] or [H, W, C], or a torch tensor [H, W] or [C, H, W], of uint8,
            uint16, bool (white is true) or floats in [0, 1]. Or what ``open_image`` takes, a file
            that is open for reading, or a web address.
        name: what errors call it.
        urls: whether web addresses are fetched.

    Raises:
        ValueError: one line, for anything that is no image.
    """
    name = name or name_of(source, 0)
    if isinstance(source, str) and source.lower().startswith(URL_STARTS):
        if not urls:
            raise ValueError(
                f"{name}: web addresses are not fetched unless that is asked for: "
                "load(..., urls=True), or --urls"
            )
        return open_image(_download(source), name=name)
    if isinstance(source, Tensor | np.ndarray):
        return open_image(image_of_array(source, name), name=name)
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    elif isinstance(source, str | PathLike):
        source = Path(source)
        if source.is_dir():
            raise ValueError(
                f"{name}: is a folder: give a list of its images, as in "
                f"sorted(Path({str(source)!r}).glob('*.jpg'))"
            )
    elif hasattr(source, "read"):
        source = source.read()
        if not isinstance(source, bytes):
            raise ValueError(f"{name}: a file that gives text; open it with mode 'rb'")
    elif not isinstance(source, str | bytes | Image.Image):
        raise ValueError(f"{name}: {type(source).__name__} is no image; expected {EXPECTED}")
    return open_image(source, name=name)


def open_mask(mask: Any, urls: bool = False) -> Image.Image:
    """A mask in mode RGB. Arrays that hold nothing but 0 and 1 are black and white."""
    mask = as_numpy(mask) if isinstance(mask, Tensor) else mask
    if isinstance(mask, np.ndarray) and mask.size and mask.dtype.kind in "biu" and mask.max() <= 1:
        mask = mask.astype(bool)
    name = name_of(mask, 0) if isinstance(mask, str | PathLike) else "the mask"
    return open_source(mask, name, urls)


def _download(address: str) -> bytes:
    """What is behind a web address.

    A server can send its headers, or a redirect, a byte at a time. So another thread waits for
    them, and ends by itself when the server does.

    Raises:
        ValueError: for anything that is not had in time.
    """
    answer = Future[bytes]()

    def fetch() -> None:
        try:
            answer.set_result(_fetch(address))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=fetch, name="download", daemon=True).start()
    try:
        return answer.result(LONGEST_DOWNLOAD)
    except TimeoutError:
        reason = f"it took more than {LONGEST_DOWNLOAD} seconds"
        raise ValueError(f"{address}: could not be fetched ({reason})") from None


def _fetch(address: str) -> bytes:
    """The same, without an end to the headers. Redirects lead to web addresses alone."""
    web, end = urllib.request.OpenerDirector(), time.monotonic() + LONGEST_DOWNLOAD
    for handler in WEB_HANDLERS:
        web.add_handler(handler())
    data = bytearray()
    try:
        with web.open(address, timeout=TIMEOUT) as answer:
            while len(data) <= MAX_DOWNLOAD and (chunk := answer.read1(CHUNK)):
                data += chunk
                if time.monotonic() > end:
                    raise TimeoutError(f"it took more than {LONGEST_DOWNLOAD} seconds")
            if len(data) <= MAX_DOWNLOAD and answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{address}: could not be fetched ({reason})") from error
    if len(data) > MAX_DOWNLOAD:
        raise ValueError(f"{address}: more than {MAX_DOWNLOAD >> 20} MiB")
    return bytes(data)


class Results(list[Any]):
    """A list of results. A notebook shows them: texts, images that were found, drawings.

    Attributes:
        skipped: what was wrong with the inputs that have no result, by their places.
    """

    def __init__(self, results: Iterable[Any] = ()) -> None:
        super().__init__(results)
        self.skipped: dict[int, ValueError] = {}

    def add(self, result: Any, on_error: OnError) -> None:
        """Append a result. An error is raised, or kept in ``skipped`` with None in its place."""
        if isinstance(result, ValueError):
            if on_error == "raise":
                raise result
            self.skipped[len(self)] = result
            result = None
        self.append(result)

    def _repr_html_(self) -> str:
        rows = [item for item in self if item is not None]
        errors = [f"<li><i>{html.escape(shown(str(e)))}</i></li>" for e in self.skipped.values()]
        return f"<ol>{''.join(f'<li>{_as_html(row)}</li>' for row in rows)}{''.join(errors)}</ol>"


class Drawings(list[Image.Image]):
    """Drawings of one text. A notebook shows them side by side."""

    def grid(self) -> Image.Image:
        """All of them in one picture."""
        return grid_of(self)

    def _repr_png_(self) -> bytes | None:
        return _png(self.grid()) if self else None


def _as_html(result: Any) -> str:
    """A text, drawings, (path, score) as ``Model.search`` gives it, or what shows itself."""
    if isinstance(result, Drawings):
        return "".join(map(_picture, result))
    if hasattr(result, "_repr_html_"):
        return str(result._repr_html_())
    if not isinstance(result, tuple):
        return html.escape(shown(str(result)))
    path, score = result
    with suppress(ValueError, OSError):  # the file may be gone
        return f"{picture_html(path)} {score:.3f} {html.escape(shown(path))}"
    return f"{score:.3f} {html.escape(shown(path))}"


def picture_html(image: Any) -> str:
    """A small picture for a notebook. Raises ``ValueError`` for what ``open_image`` refuses."""
    picture = open_image(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return _picture(picture)


def _picture(image: Image.Image) -> str:
    return f"<img src='data:image/png;base64,{base64.b64encode(_png(image)).decode()}'>"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
