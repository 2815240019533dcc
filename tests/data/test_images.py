"""Every image gives the right pixels, or a ValueError that names the file."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from multimodal.data.images import augment_image, fit_image, open_image, to_image, to_tensor


def noise(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def quarters(width: int = 64, height: int = 48) -> Image.Image:
    """Red, green over blue, white. A JPEG keeps such large areas, and a rotation is visible."""
    image = Image.new("RGB", (width, height))
    for box, colour in (
        ((0, 0), "#ff0000"),
        ((width // 2, 0), "#00ff00"),
        ((0, height // 2), "#0000ff"),
        ((width // 2, height // 2), "#ffffff"),
    ):
        image.paste(Image.new("RGB", (width // 2, height // 2), colour), box)
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG in which single parts can be wrong."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refused(source: object, name: str = "bad.img") -> str:
    with pytest.raises(ValueError) as caught:
        open_image(source, name=name)  # type: ignore[arg-type]
    message = str(caught.value)
    assert type(caught.value) is ValueError and message.startswith(f"{name}: ")
    assert "\n" not in message and len(message) > len(name) + 8
    return message


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_good_image_has_the_saved_pixels(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(), kind, lossless=True)
    path = tmp_path / f"good.{kind.lower()}"
    path.write_bytes(data)
    for source in (data, path, str(path), Image.open(path)):
        assert (pixels(open_image(source)) == pixels(noise())).all()


def test_a_good_jpeg_is_close() -> None:
    for options in ({}, {"progressive": True}):
        image = open_image(encoded(quarters(), "JPEG", quality=95, **options))
        assert abs(pixels(image) - pixels(quarters())).mean() < 4


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {}), ("JPEG", {}), ("JPEG", {"progressive": True})],
)
def test_bit_flips_never_crash(kind: str, options: dict[str, object]) -> None:
    good = encoded(noise(), kind, **options)
    expected = pixels(open_image(good))
    rng = np.random.default_rng(1)
    noticed = 0
    for _ in range(600):
        data = bytearray(good)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] ^= 1 << int(rng.integers(8))
        try:
            image = open_image(bytes(data), name="bad.img")
        except ValueError as error:
            assert str(error).startswith("bad.img: ") and "\n" not in str(error)
            noticed += 1
        else:
            if kind == "PNG":  # its checksums notice all flips that change pixels
                assert (pixels(image) == expected).all()
    assert kind != "PNG" or noticed > 580


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {}), ("JPEG", {}), ("JPEG", {"progressive": True})],
)
def test_a_truncated_image_is_an_error_at_every_length(
    kind: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other libraries change this global setting.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise(), kind, **options)
    for length in range(len(data)):
        refused(data[:length])
    open_image(data)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_png_with_missing_rows_is_an_error() -> None:
    complete = b"".join(b"\0" + bytes([row] * 30) for row in range(8))
    assert pixels(open_image(png(10, 8, 8, 2, complete)))[7, 0, 0] == 7
    assert "truncated" in refused(png(10, 8, 8, 2, complete[: 31 * 5]))
    assert "truncated" in refused(png(10, 8, 8, 2, complete[:-1]))


def test_an_interlaced_png_is_read() -> None:
    # Pillow cannot write this, so the test writes the seven passes. Each pixel is its index.
    width, height = 11, 9
    picture = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    starts = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )
    rows = b"".join(
        b"\0" + row.tobytes()
        for first_row, first_column, row_step, column_step in starts
        for row in picture[first_row::row_step, first_column::column_step]
        if row.size
    )

    def interlaced(rows: bytes) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1))
        body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + header + body

    assert (pixels(open_image(interlaced(rows)))[..., 0] == picture).all()
    refused(interlaced(rows[:-1]))


def test_decoding_of_a_png_bomb_stops_early() -> None:
    open_image(png(4, 4, 8, 0, bytes(300_000_000)))  # the first 20 bytes are enough


@pytest.mark.parametrize(
    "data", [b"", b"not an image at all", b"\0" * 4096, b"GIF89a" + b"\0" * 99]
)
def test_other_data_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_bytes(data)
    refused(data)
    refused(path, str(path))


def test_other_formats_are_refused() -> None:
    for kind in ("PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000"):
        assert "not an image that can be read" in refused(encoded(noise(), kind))


def test_paths_without_a_regular_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jpg", tmp_path, tmp_path / "a\0b.jpg", tmp_path / ("x" * 999)):
        refused(path, str(path))
        refused(str(path), str(path))
    os.mkfifo(tmp_path / "pipe.jpg")  # would block forever
    assert "not a regular file" in refused(tmp_path / "pipe.jpg", str(tmp_path / "pipe.jpg"))
    with pytest.raises(ValueError, match="missing.jpg: no such file"):
        open_image(tmp_path / "missing.jpg")


def test_a_large_image_is_refused_by_its_header() -> None:
    assert "400000000" in refused(png(20_000, 20_000, 8, 2, b"")).replace(",", "")
    assert "100,000,000 pixels" in refused(png(12_000, 12_000, 8, 2, b""))
    jpeg = bytearray(encoded(noise(), "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 20_000, 20_000)
    assert "too large" in refused(bytes(jpeg))
    with pytest.raises(ValueError, match="over the limit of 1,000 pixels"):
        open_image(encoded(noise(), "PNG"), max_pixels=1000)
    with pytest.raises(ValueError, match="over the limit of 1,000 pixels"):
        open_image(noise(), max_pixels=1000)


def test_strips_are_refused() -> None:
    for size in ((1, 100_000), (100_000, 1), (201, 1)):
        assert "strip" in refused(encoded(Image.new("RGB", size), "PNG"))
    assert open_image(encoded(Image.new("RGB", (200, 1)), "PNG")).size == (200, 1)
    assert "no pixels" in refused(Image.new("RGB", (0, 5)))


def test_cmyk_has_the_right_colours() -> None:
    got = pixels(open_image(encoded(quarters().convert("CMYK"), "JPEG", quality=95)))
    assert abs(got - pixels(quarters())).mean() < 4


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256, 257, 1000], [32768, 40000, 65279, 65534, 65535]], np.uint16)
    expected = np.round(values / 257).astype(int)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    for source in (
        png(5, 2, 16, 0, rows),
        Image.fromarray(values),
        Image.fromarray(values.astype(np.int32)),  # mode I
    ):
        got = pixels(open_image(source))
        assert (got == expected[..., None]).all()
    transparent = png(5, 2, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 1000)))
    assert pixels(open_image(transparent))[0].tolist()[-1] == [255] * 3
    assert pixels(open_image(transparent))[1].tolist()[-2:] == [[255] * 3] * 2
    refused(Image.fromarray(np.full((4, 4), 70_000, np.int32)))
    refused(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_16_bit_colour_is_scaled() -> None:
    row = struct.pack(">6H", 0, 32768, 65535, 65535, 257, 0)
    got = pixels(open_image(png(2, 1, 16, 2, b"\0" + row)))
    assert abs(got - [[[0, 127.5, 255], [255, 1, 0]]]).max() < 1


def test_transparency_is_composed_on_white() -> None:
    image = Image.new("RGBA", (4, 1))
    for x, alpha in enumerate((0, 128, 255, 0)):
        image.putpixel((x, 0), (200, 0, 100, alpha))
    got = pixels(open_image(encoded(image, "PNG")))[0]
    assert got[0].tolist() == [255, 255, 255] and got[2].tolist() == [200, 0, 100]
    assert abs(got[1] - [227.5, 127, 177]).max() <= 1
    grey = image.convert("LA")
    assert pixels(open_image(encoded(grey, "PNG")))[0, 0].tolist() == [255, 255, 255]
    assert pixels(open_image(encoded(image, "WEBP", lossless=True)))[0, 3].tolist() == [255] * 3


def test_transparent_colours_become_white() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for x in range(3):
        palette.putpixel((x, 0), x)
    expected = [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    assert pixels(open_image(encoded(palette, "PNG", transparency=1)))[0].tolist() == expected
    alphas = encoded(palette, "PNG", transparency=b"\xff\x00\xff")
    assert pixels(open_image(alphas))[0].tolist() == expected
    assert pixels(open_image(encoded(palette, "PNG")))[0, 1].tolist() == [0, 255, 0]
    rgb = png(2, 1, 8, 2, b"\0\x01\x02\x03\x04\x05\x06", chunk(b"tRNS", b"\0\x01\0\x02\0\x03"))
    assert pixels(open_image(rgb))[0].tolist() == [[255, 255, 255], [4, 5, 6]]
    grey = png(2, 1, 8, 0, b"\0\x07\x08", chunk(b"tRNS", b"\0\x07"))
    assert pixels(open_image(grey))[0].tolist() == [[255, 255, 255], [8, 8, 8]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [quarters(), Image.new("RGB", (64, 48), "black")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True
    )
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert (pixels(open_image(data)) == pixels(quarters())).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied_once(turn: int) -> None:
    # For each orientation, how a camera stores an upright scene: the inverse of the rotation.
    stored: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    upright = np.asarray(quarters())
    image = Image.fromarray(np.ascontiguousarray(stored[turn](upright)))
    exif = Image.Exif()
    exif[0x0112] = turn
    got = open_image(encoded(image, "PNG", exif=exif))
    assert (pixels(got) == upright).all()
    assert (pixels(open_image(got)) == upright).all()
    assert abs(pixels(open_image(encoded(image, "JPEG", exif=exif))) - upright).mean() < 6


def test_broken_exif_counts_as_upright() -> None:
    data = encoded(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01\x12" * 30)
    assert open_image(data).size == (64, 48)


def test_the_source_is_not_changed() -> None:
    image = noise()
    result = open_image(image)
    result.paste("black", (0, 0, *result.size))
    assert (pixels(image) == pixels(noise())).all()


def test_each_fit() -> None:
    wide = quarters(80, 40)
    squash, crop, letterbox = (
        pixels(fit_image(wide, 20, fit)) for fit in ("squash", "crop", "letterbox")
    )
    for result in (squash, crop, letterbox):
        assert result.shape == (20, 20, 3)
    assert squash[2, 2].tolist() == [255, 0, 0] and squash[17, 17].tolist() == [255, 255, 255]
    assert crop[2, 2].tolist() == [255, 0, 0] and crop[2, 17].tolist() == [0, 255, 0]
    assert (letterbox[:5] == 127).all() and (letterbox[15:] == 127).all()
    assert letterbox[7, 2].tolist() == [255, 0, 0]
    # A strip keeps at least one row.
    strip = pixels(fit_image(Image.new("RGB", (200, 1), "red"), 8, "letterbox"))
    assert strip[3].tolist() == [[255, 0, 0]] * 8 and (strip[[0, 7]] == 127).all()
    for arguments in ((0, "crop"), (8, "stretch")):
        with pytest.raises(ValueError):
            fit_image(wide, *arguments)


def test_shrinking_is_antialiased() -> None:
    checks = np.indices((128, 128)).sum(0) % 2 * 255
    image = Image.fromarray(checks.astype(np.uint8)).convert("RGB")
    for fit in ("squash", "crop", "letterbox"):
        assert abs(pixels(fit_image(image, 16, fit)) - 127.5).max() < 8


def test_tensors_round_trip() -> None:
    tensor = to_tensor(noise())
    assert tensor.shape == (3, 30, 40) and tensor.dtype == torch.float32
    assert -1 <= tensor.min() and tensor.max() <= 1
    assert to_tensor(Image.new("RGB", (1, 1), (0, 255, 0))).flatten().tolist() == [-1, 1, -1]
    assert (pixels(to_image(tensor)) == pixels(noise())).all()
    assert pixels(to_image(torch.tensor([5.0, -5.0, 0.0]).view(3, 1, 1)))[0, 0, :2].tolist() == [
        255,
        0,
    ]
    with pytest.raises(ValueError, match="finite"):
        to_image(torch.full((3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        to_image(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="mode RGB"):
        to_tensor(Image.new("L", (2, 2)))


def test_augmentation_is_a_function_of_the_generator() -> None:
    image = quarters()

    def first(seed: int, **options: object) -> tuple[bytes, float]:
        rng = np.random.default_rng(seed)
        result = augment_image(image, 16, rng, **options)  # type: ignore[arg-type]
        return result.tobytes(), rng.random()

    assert first(0) == first(0) and first(0)[0] != first(1)[0]
    # Later random numbers do not depend on the options.
    assert first(0)[1] == first(0, flip=False, scale=(1.0, 1.0))[1]
    full = pixels(fit_image(image, 16, "squash"))
    corners = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        result = pixels(augment_image(image, 16, rng))
        assert result.shape == (16, 16, 3)
        # A crop of 0.6 of the area always holds the centre.
        corners.add(tuple(result[0, 0]))
    assert {(255, 0, 0), (0, 255, 0)} == corners, "flips are horizontal only"
    plain = [augment_image(image, 16, np.random.default_rng(s), flip=False) for s in range(50)]
    assert all(tuple(pixels(p)[0, 0]) == (255, 0, 0) for p in plain)
    assert len({p.tobytes() for p in plain}) > 40
    assert abs(np.mean([pixels(p) for p in plain], axis=0) - full).mean() < 25
    with pytest.raises(ValueError, match="scale"):
        augment_image(image, 16, np.random.default_rng(0), scale=(0.0, 1.0))
