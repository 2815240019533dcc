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

MAX_SCANS = 100  # of a JPEG. Encoders write up to about 20.
MAX_SCANNED_PIXELS = 2_000_000_000  # each scan is a pass over all pixels: some seconds
# Bytes that some cameras and encoders leave behind the data. libjpeg skips them.
MAX_STRAY_BYTES = 16
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x(?!d[0-7])")
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG file")
_JPEG_HOLE = 64  # more than two blocks of 8 x 8 in which every coefficient is there
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
        _check_jpeg(data, image.width * image.height, cmyk=image.mode == "CMYK")
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


def _check_jpeg(data: bytes, pixels: int, cmyk: bool) -> None:
    import simplejpeg

    metadata, first_scan = _headers(data)
    most = max(1, min(MAX_SCANS, MAX_SCANNED_PIXELS // max(pixels, 1)))
    # Two bytes that look like a scan can also be in what follows the image, a film for instance.
    if data.count(b"\xff\xda", first_scan) > most and _count_scans(data, first_scan) > most:
        raise ValueError(f"a JPEG of over {most} scans, which would take very long")
    hole = data.find(bytes(_JPEG_HOLE), first_scan)
    if hole >= 0 and _has_no_runs(data) and hole < _end_of_scan(data, first_scan + 2):
        raise ValueError(f"damaged image: its data hold {_JPEG_HOLE} zeros in a row at byte {hole}")
    parts, start = [], 0
    for begin, end in metadata:
        parts.append(data[start:begin])
        start = end
    plain = b"".join([*parts, data[start:]])
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


def _segments(data: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """(kind, begin, end) of the segments of a JPEG up to its end, or to where it makes no sense."""
    while start + 4 <= len(data):
        if data[start] != 0xFF:  # stray bytes between segments
            start = data.find(b"\xff", start)
            if start < 0:
                return
        elif data[start + 1] == 0xFF:  # a marker may begin with several of them
            start += 1
        else:
            kind, end = data[start + 1], start + 2
            if kind == 0xD9:
                return
            if not (0xD0 <= kind <= 0xD8 or kind in (0x00, 0x01)):
                end += int.from_bytes(data[end : end + 2], "big")
            yield kind, start, end
            start = _end_of_scan(data, end) if kind == 0xDA else end


def _headers(data: bytes) -> tuple[list[tuple[int, int]], int]:
    """Where metadata are (APPn, comments: libjpeg warns of oddities there), and the first scan."""
    metadata: list[tuple[int, int]] = []
    for kind, begin, end in _segments(data, 2):
        if kind == 0xDA:
            return metadata, begin
        if 0xE0 <= kind <= 0xEF or kind == 0xFE:
            metadata.append((begin, end))
    return metadata, len(data)


def _has_no_runs(data: bytes) -> bool:
    """Whether coded pixels of a JPEG cannot be a long run of zeros.

    The code of zeros alone is the first of a Huffman table. If it ends a block in all tables, as an
    encoder can choose, one colour is a run of zeros. If it is a coefficient, a run of zeros is
    pixels that no image has.
    """
    sequential, ends_block = False, []
    for kind, begin, end in _segments(data, 2):
        sequential |= kind in (0xC0, 0xC1)
        if kind == 0xDA:
            break
        table = begin + 4
        while kind == 0xC4 and table + 17 < min(end, len(data)):
            if data[table] >> 4:  # of coefficients after the first
                ends_block.append(data[table + 17] == 0)
            table += 17 + sum(data[table + 1 : table + 17])
    return sequential and bool(ends_block) and not all(ends_block)


def _count_scans(data: bytes, start: int) -> int:
    return sum(kind == 0xDA for kind, _, _ in _segments(data, start))


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
    width, height = tags.get(322), tags.get(323)
    if isinstance(width, int) and isinstance(height, int) and width * height > MAX_TILE:
        raise ValueError(f"too large: a tile of {width}x{height} pixels")
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
