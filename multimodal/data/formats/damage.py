"""Damage in image files that Pillow does not report.

A download that lost a part leaves a file that decodes: grey below the gap, or a picture that is
shifted and in wrong colours. PNG has checksums (multimodal/data/images.py). Here is the rest.

- **JPEG.** libjpeg notices codes that cannot be and data that end early, or too late, but only
  warns, and Pillow drops its warnings. So the data are decoded once more, by libjpeg-turbo, and a
  warning about them is an error.
- **WebP, AVIF, HEIC, compressed TIFF** have no checksums, and their decoders stop only where the
  data make no sense. What can be checked: that no part goes past the end of the file, and that the
  data hold no long run of zeros, which compressed data never have.
- **GIF**: Pillow's decoder stops at wrong codes. **BMP, raw TIFF**: every byte is a pixel, so only
  the length can be checked, and Pillow does.
"""

import re
import struct
from collections.abc import Iterator

from PIL import Image

MAX_SCANS = 100  # of a JPEG. Encoders write up to about 20. Each costs a pass over all pixels.
# Bytes that some cameras and encoders leave behind the data. libjpeg skips them.
MAX_STRAY_BYTES = 16
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x(?!d[0-7])")
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file")
# A picture of one colour is a run of zeros in a lossy WebP: 1 byte for 10,000 pixels (measured).
_SHORTEST_HOLE, _PIXELS_OF_A_ZERO = 256, 4000
MAX_TILE = 1 << 24  # pixels of a tile of a TIFF, which is decoded as a whole
_RAW_TIFF = ("raw", "packbits")


def check_damage(image: Image.Image, data: bytes) -> None:
    """Raise ``ValueError`` for damage in an image file.

    Args:
        image: opened with Pillow. Its header is read, its pixels need not be.
        data: the file.
    """
    if data[:2] == b"\xff\xd8":
        _check_jpeg(data, cmyk=image.mode == "CMYK")
    elif image.format == "WEBP":
        for kind, body in _chunks(data):
            if kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANMF"):
                _check_hole(image, body)
    elif image.format in ("AVIF", "HEIF"):
        exif: bytes = image.info.get("exif") or b""
        for kind, body in _boxes(data):
            if kind == b"mdat":
                # Cameras leave zeros in their EXIF, which lies among the data.
                _check_hole(image, body.replace(exif, b"") if exif else body)
    elif image.format == "TIFF":
        _check_tiff(image, data)


def _check_jpeg(data: bytes, cmyk: bool) -> None:
    import simplejpeg

    plain = _without_metadata(data)
    try:
        # Grey at an eighth of the size: every code is read, and few pixels are made.
        simplejpeg.decode_jpeg(
            plain, "CMYK" if cmyk else "GRAY", min_height=1, min_width=1, min_factor=8, strict=True
        )
    except ValueError as error:
        message = str(error)
        stray = _STRAY.search(message)
        if stray is None or int(stray[1]) > MAX_STRAY_BYTES:
            if message.startswith(_DAMAGE):  # others are for Pillow to judge: it reads more kinds
                raise ValueError(f"damaged image ({message})") from error


def _without_metadata(data: bytes) -> bytes:
    """A JPEG without APPn and comments, whose oddities libjpeg warns of, too.

    Raises:
        ValueError: for more than MAX_SCANS scans.
    """
    parts, scans, position = [data[:2]], 0, 2
    while position + 4 <= len(data):
        marker, kind = data[position], data[position + 1]
        if marker != 0xFF:  # stray bytes between segments
            following = data.find(b"\xff", position)
            following = len(data) if following < 0 else following
            parts.append(data[position:following])
            position = following
            continue
        if kind == 0xFF:  # a marker may begin with several of them
            position += 1
            continue
        if kind == 0xD9:
            break
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        stop = position + 2 + (0 if 0xD0 <= kind <= 0xD8 or kind in (0x00, 0x01) else length)
        if kind == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise ValueError(f"a JPEG of over {MAX_SCANS} scans: it would take very long")
            stop = _end_of_scan(data, stop)
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            parts.append(data[position:stop])
        position = max(stop, position + 2)
    parts.append(data[position:])
    return b"".join(parts)


_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


def _end_of_scan(data: bytes, start: int) -> int:
    """The next marker after coded data. In these, 0xFF is followed by 0 or is a restart marker."""
    found = _NEXT_MARKER.search(data, start)
    return found.start() if found else len(data)


def _check_hole(image: Image.Image, data: bytes) -> None:
    """Raise ``ValueError`` for a run of zeros that compressed pixels cannot have."""
    longest = _SHORTEST_HOLE + image.width * image.height // _PIXELS_OF_A_ZERO
    if (start := data.find(bytes(longest))) >= 0:
        raise ValueError(f"damaged image: its data hold {longest} zeros in a row at byte {start}")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of the chunks of a RIFF file, WebP for instance."""
    start, stop = 12, int.from_bytes(data[4:8], "little") + 8
    if stop > len(data):
        raise ValueError("truncated: the file is shorter than its header says")
    while start + 8 <= stop:
        kind, length = struct.unpack_from("<4sI", data, start)
        if start + 8 + length > stop:
            raise ValueError(f"truncated: chunk {kind!r} goes past the end of the file")
        yield kind, data[start + 8 : start + 8 + length]
        start += 8 + length + length % 2


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, body) of the boxes of an ISO media file (AVIF, HEIC)."""
    start = 0
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if length == 1 and start + 16 <= len(data):
            (length,), head = struct.unpack_from(">Q", data, start + 8), 16
        elif length == 0:  # up to the end of the file
            length = len(data) - start
        if length < head or start + length > len(data):
            raise ValueError(f"truncated: box {kind!r} goes past the end of the file")
        yield kind, data[start + head : start + length]
        start += length


def _check_tiff(image: Image.Image, data: bytes) -> None:
    """The parts of the first picture of a TIFF: strips or tiles."""
    tags = getattr(image, "tag_v2", {})
    tile = (tags.get(322), tags.get(323))
    if all(isinstance(side, int) for side in tile) and tile[0] * tile[1] > MAX_TILE:
        raise ValueError(f"too large: a tile of {tile[0]}x{tile[1]} pixels")
    starts, lengths = (tags.get(273) or tags.get(324), tags.get(279) or tags.get(325))
    if not isinstance(starts, tuple) or not isinstance(lengths, tuple):
        return
    if len(starts) != len(lengths):
        raise ValueError(f"damaged TIFF: {len(starts)} strips, but {len(lengths)} lengths")
    compressed = image.info.get("compression", "raw") not in _RAW_TIFF
    for start, length in zip(starts, lengths, strict=True):
        if start + length > len(data):
            raise ValueError("truncated: a strip goes past the end of the file")
        if compressed:
            _check_hole(image, data[start : start + length])
