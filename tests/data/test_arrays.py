"""Arrays are read as a PNG of the same numbers is."""

import struct
import zlib

import numpy as np
import pytest
import torch

from multimodal.data.formats.arrays import image_of_array
from multimodal.data.images import open_image


def png(array: np.ndarray) -> bytes:
    """[H, W] or [H, W, C] of 8 or 16 bits."""
    height, width, channels = (*array.shape, 1)[:3]
    colour, bits = {1: 0, 2: 4, 3: 2, 4: 6}[channels], 8 * array.itemsize
    rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        data += struct.pack(">I", len(body)) + kind + body + checksum
    return data


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_an_array_is_read_as_a_file_of_the_same_numbers(
    dtype: type[np.unsignedinteger], channels: int | None
) -> None:
    shape = (6, 5) if channels is None else (6, 5, channels)
    top = np.iinfo(dtype).max
    array = np.random.default_rng(0).integers(0, top, shape, dtype, endpoint=True)
    expected = np.asarray(open_image(png(array)))
    forms = [array, array.astype(array.dtype.newbyteorder(">"))]
    forms += [torch.from_numpy(array if channels is None else array.transpose(2, 0, 1).copy())]
    for form in forms:
        assert (np.asarray(open_image(image_of_array(form, "it"))) == expected).all()
    assert expected.std() > 20, "images that differ enough to compare"
