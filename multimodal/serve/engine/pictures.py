"""Pictures in requests, from untrusted text to pixels, and pictures in responses."""

import base64
import binascii
import hashlib
import io
import re
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from multimodal.data.images import open_header, open_image, upright
from multimodal.origin.credentials import Drawing, Signer
from multimodal.serve.engine.errors import ApiError
from multimodal.serve.engine.fetch import fetch
from multimodal.serve.engine.settings import Settings

MAX_SIDE = 1 << 31
OutputFormat = Literal["png", "jpeg", "webp"]
MAX_HEAD = 200  # characters of a data URI before its data
_HEAD = re.compile(r"data:[\w.+/-]*(?:;[\w=.+-]+)*;base64", re.ASCII | re.IGNORECASE)


class Budget:
    """Bytes that decoded images may take, of all requests together.

    An image of a few kilobytes may be decoded to hundreds of megabytes, and a request keeps them
    while it waits.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    def take(self, size: int) -> None:
        """Raises ``ApiError`` 429 if there is not enough left."""
        if self.used + size > self.most:
            message = "too many pixels are being worked on: try again later"
            raise ApiError(429, message, code="too_many_pixels", retry_after=2)
        self.used += size

    def give_back(self, size: int) -> None:
        self.used -= size


def is_address(url: str) -> bool:
    """Whether an image is to be fetched."""
    return url[:8].lower().startswith(("http://", "https://"))


def fetch_image(url: str, settings: Settings, seconds: float) -> bytes:
    """The bytes behind an address. Raises ``ApiError``."""
    if not settings.fetch:
        raise _bad("this server fetches no addresses: send the image as a data URI")
    try:
        return fetch(url, settings.max_body, settings.private, seconds)
    except ValueError as error:
        raise _bad(str(error)) from error


def read_data_uri(url: str) -> bytes:
    """The bytes of a data URI. Raises ``ApiError``."""
    if url[:5].lower() == "data:":
        comma = url.find(",", 0, MAX_HEAD)
        if comma < 0 or _HEAD.fullmatch(url, 0, comma) is None:
            raise _bad("expected data:image/...;base64,...")
        try:
            return base64.b64decode(url[comma + 1 :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise _bad(f"not base64 ({error})") from error
    raise _bad("expected a data URI, or an http or https address")


def read_image(data: bytes, settings: Settings, name: str = "image") -> Image.Image:
    """Bytes as an image in mode RGB. Raises ``ApiError``."""
    check_pixels(data, settings, name)
    try:
        return open_image(data, max_pixels=settings.max_pixels, name=name)
    except ValueError as error:
        raise ApiError(400, str(error), param=name, code="invalid_image") from error


def read_transparency(data: bytes, settings: Settings, name: str = "mask") -> Image.Image | None:
    """White where an image is transparent, in mode L. None: it has no transparency at all.

    Raises:
        ApiError: if it is no image.
    """
    read_image(data, settings, name)  # complete and undamaged
    with open_header(data) as image:
        if not image.has_transparency_data:
            return None
        alpha = upright(image, image.convert("RGBA").getchannel("A"))
    return alpha.point(lambda value: 255 if value < 128 else 0)


def check_pixels(data: bytes, settings: Settings, name: str) -> int:
    """How many pixels the header of an image says. 0 if there is none.

    Raises:
        ApiError: with status 413 for too many.
    """
    try:
        with open_header(data) as image:
            width, height = image.size
            size = f"{width} x {height} is"
    except Image.DecompressionBombError:
        width = height = MAX_SIDE
        size = "its header says"
    except Exception:  # what it is not, ``open_image`` says
        return 0
    if width * height > settings.max_pixels:
        raise ApiError(
            413,
            f"{name}: {size} over the limit of {settings.max_pixels:,} pixels",
            param=name,
            code="image_too_large",
        )
    return width * height


@dataclass(frozen=True)
class Credentials:
    """What signs images, and what is said of them."""

    signer: Signer
    drawing: Drawing


def to_base64(
    image: Image.Image,
    kind: OutputFormat = "png",
    quality: int = 100,
    credentials: Credentials | None = None,
) -> str:
    """The bytes of an image file, in base64. quality: of JPEG and WebP, 0 to 100."""
    more: dict[str, Any] = {} if kind == "png" else {"quality": quality}
    if credentials is None:
        buffer = io.BytesIO()
        image.save(buffer, kind.upper(), **more)
        data = buffer.getvalue()
    else:
        data = credentials.signer.sign(image, kind.upper(), credentials.drawing, **more)
    return base64.b64encode(data).decode("ascii")


def _bad(reason: str) -> ApiError:
    return ApiError(400, f"image: {reason}", param="image", code="invalid_image")


def digest_of(data: bytes | Tensor) -> str:
    """The SHA-256 of bytes, or of the numbers of a tensor, of which it is found once."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    digest = _digests.get(data)  # type: ignore[no-untyped-call]
    if digest is None:
        digest = _digests[data] = hashlib.sha256(data.contiguous().numpy().data).hexdigest()
    return str(digest)


_digests = WeakIdKeyDictionary()
