"""Every format that people have is read, and damage in any of them is an error."""

import importlib.util
import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multimodal.data.builder.build import build_shards
from multimodal.data.images import open_image
from multimodal.data.shards import Shards

# Each with its options of Pillow.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {"quality": 90}),
    "jpeg, not subsampled": ("JPEG", {"quality": 90, "subsampling": 0}),
    "jpeg, RGB": ("JPEG", {"quality": 90, "keep_rgb": True}),
    "jpeg, progressive": ("JPEG", {"quality": 90, "progressive": True}),
    "jpeg, with restarts": ("JPEG", {"quality": 90, "restart_marker_blocks": 8}),
    "jpeg, optimised": ("JPEG", {"quality": 60, "optimize": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 90}),
    "webp, lossless": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "tiff, LZW": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff, deflate": ("TIFF", {"compression": "tiff_deflate"}),
    "tiff, JPEG": ("TIFF", {"compression": "jpeg"}),
    "avif": ("AVIF", {"quality": 90}),
}
RAW = {"bmp": ("BMP", {}), "tiff": ("TIFF", {})}  # every byte is a pixel


def photo(side: int = 256, mode: str = "RGB") -> Image.Image:
    """Smooth, with noise: compressed, it has data everywhere."""
    y, x = np.mgrid[0:side, 0:side] * 256 // side
    noise = np.random.default_rng(0).integers(0, 30, (side, side, 3))
    pixels = (np.stack([x, y, (x + y) // 2], -1) + noise).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gaps(data: bytes, place: float) -> dict[str, bytes]:
    """What interrupted downloads leave. place: where, as a share of the file."""
    at = int(len(data) * place)
    return {
        "the rest is missing": data[:at],
        "the rest is missing, but for the end": data[:at] + data[-2:],
        "4 KiB of zeros": data[:at] + bytes(4096) + data[at + 4096 :],
        "4 KiB less": data[:at] + data[at + 4096 :],
        "all zeros from here": data[:at] + bytes(len(data) - at),
    }


@pytest.mark.parametrize("name", FORMATS)
def test_a_gap_is_an_error(name: str) -> None:
    kind, options = FORMATS[name]
    for mode in ("RGB", "L", "CMYK") if name == "jpeg" else ("RGB",):
        whole = encoded(photo(mode=mode), kind, **options)
        assert open_image(whole).size == (256, 256)
        kept = [
            (what, place)
            for place in (0.3, 0.45, 0.6)
            for what, data in gaps(whole, place).items()
            if _opens(data)
        ]
        assert kept == []


@pytest.mark.parametrize("name", RAW)
def test_raw_pixels_that_are_missing_are_an_error(name: str) -> None:
    kind, options = RAW[name]
    whole = encoded(photo(), kind, **options)
    for what, data in gaps(whole, 0.5).items():
        assert _opens(data) == ("zeros" in what)  # black pixels


def _opens(data: bytes) -> bool:
    try:
        open_image(data, name="a file")
    except ValueError as error:
        assert str(error).startswith("a file: ") and "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("name", [*FORMATS, *RAW])
def test_a_whole_image_has_the_pixels_that_pillow_reads(name: str) -> None:
    kind, options = (FORMATS | RAW)[name]
    for image in (photo(64), photo(33), Image.new("RGB", (3000, 2000), "black")):
        data = encoded(image, kind, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (np.asarray(open_image(data)) == expected).all()


def test_zeros_in_the_metadata_are_no_damage() -> None:
    exif = Image.Exif()
    exif[0x927C] = bytes(5000)  # a maker's note
    for name in ("jpeg", "webp", "avif", "tiff, LZW"):
        kind, options = FORMATS[name]
        assert open_image(encoded(photo(), kind, exif=exif.tobytes(), **options)).size[0] == 256


def test_oddities_that_are_no_damage_are_allowed_in_a_jpeg() -> None:
    data = encoded(photo(), "JPEG", comment=b"x\xff\xd9\xff\xda")
    expected = np.asarray(open_image(data))
    odd = {
        "some stray bytes before the end": data[:-2] + bytes(8) + data[-2:],
        "an unknown version of JFIF": data.replace(b"JFIF\0\x01\x01", b"JFIF\0\x09\x01"),
        "anything behind the end": data + b"\xff\xd8 more" * 100,
        "markers with fill bytes": data.replace(b"\xff\xda\0", b"\xff\xff\xff\xda\0"),
    }
    for what, other in odd.items():
        assert other != data and (np.asarray(open_image(other)) == expected).all(), what


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encoded(photo(512), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert _opens(data)
    for count in (95, 3000):
        bomb = data[:-2] + scan * count + data[-2:]
        with pytest.raises(ValueError, match="a file: a JPEG of over 100 scans"):
            open_image(bomb, name="a file")
        # The end of the image in a comment is not its end.
        comment = b"\xff\xfe\0\x06\xff\xd9\xff\xd9"
        with pytest.raises(ValueError, match="a file: a JPEG of over 100 scans"):
            open_image(data[:-2] + comment + scan * count + data[-2:], name="a file")
    assert _opens(data + scan * 3000)  # behind the end, as films are in photos of telephones


def test_a_tile_of_a_tiff_is_bounded() -> None:
    """100 x 100 pixels in one tile of 60,000 x 60,000, which a decoder would allocate."""
    fields = {256: 100, 257: 100, 258: 8, 259: 5, 262: 1, 277: 1, 322: 60000, 323: 60000}
    fields |= {324: 8, 325: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    data = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + entries + bytes(200)
    with pytest.raises(ValueError, match="a file: too large: a tile of 60000x60000"):
        open_image(data, name="a file")


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, True), (16, False)])
def test_grey_of_a_tiff_has_the_scale_and_the_white_that_the_file_says(
    bits: int, white_is_zero: bool
) -> None:
    top = 2**bits - 1
    values = [0, top // 4, top // 2, top]
    packed = struct.pack("<4H", *values)
    if bits == 12:  # without gaps
        packed = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    fields = {256: 4, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero)}
    fields |= {273: 122, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    data = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + entries + bytes(4) + packed
    grey = [round(255 * value / top) for value in values]
    expected = [255 - value for value in grey] if white_is_zero else grey
    assert np.asarray(open_image(data))[0, :, 0].tolist() == expected


def test_heic_is_read_with_pillow_heif_and_named_without_it() -> None:
    if importlib.util.find_spec("pillow_heif") is None:
        header = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
        with pytest.raises(ValueError, match=r"a file: HEIC needs pillow-heif: pip install"):
            open_image(header, name="a file")
        return
    from pillow_heif import from_pillow

    buffer = io.BytesIO()
    from_pillow(photo()).save(buffer, quality=90)
    data = buffer.getvalue()
    difference = np.asarray(open_image(data)).astype(int) - np.asarray(photo())
    assert abs(difference).mean() < 12
    for place in (0.4, 0.6):
        assert not any(map(_opens, gaps(data, place).values()))


def test_a_build_reads_every_format_and_keeps_what_is_without_loss(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    ends = {"gif": "png", "bmp": "png", "tif": "png", "avif": "jpg", "webp": "webp", "jfif": "jpg"}
    kinds = {"tif": "TIFF", "jfif": "JPEG"}
    for suffix in ends:
        data = encoded(photo(32), kinds.get(suffix, suffix.upper()))
        (source / f"{suffix}.{suffix}").write_bytes(data)
        (source / f"{suffix}.txt").write_text(suffix, "utf-8")
        # The gap: every sample is kept or rejected by name.
        (source / f"{suffix}_half.{suffix}").write_bytes(data[: len(data) // 2])
        (source / f"{suffix}_half.txt").write_text("half", "utf-8")
    report = build_shards(source, out)
    assert report is not None and (report.kept, report.rejected) == (len(ends), len(ends))
    for sample in Shards(out):
        assert set(sample.members) == {ends[sample.key], "json"}
        before = np.asarray(open_image(source / f"{sample.key}.{sample.key}")).astype(int)
        after = np.asarray(open_image(sample.image)).astype(int)
        assert abs(before - after).mean() < (6 if ends[sample.key] == "jpg" else 0.001)


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes of the kinds that disks, networks and attackers make."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(changed) + 1), rng.choice([1, 2, 7, 64, 512, 4096])
        match rng.randrange(6):
            case 0:
                changed[at : at + length] = bytes(min(length, len(changed) - at))
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[rng.randrange(len(changed) + 1) :][:length]
            case 3:
                changed[at : at + length] = rng.randbytes(min(length, len(changed) - at))
            case 4:
                changed[at:] = b""
            case 5:  # a field of a header
                at = rng.randrange(min(200, len(changed)) + 1)
                changed[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def _fuzz(folder: Path, count: int, seed: int) -> None:
    """Build from mutated files: kept + rejected = given, and every kept one can be opened."""
    rng = random.Random(seed)
    sources = [encoded(photo(48), kind, **options) for kind, options in (FORMATS | RAW).values()]
    sources += [encoded(photo(20, "RGBA"), "PNG"), encoded(photo(20, "L"), "TIFF")]
    source, out = folder / "source", folder / "out"
    source.mkdir()
    for number in range(count):
        data = _mutated(sources[number % len(sources)], rng)
        suffix = rng.choice(["jpg", "png", "gif", "tif", "webp", "avif", "bmp"])  # it need not fit
        (source / f"{number:05}.{suffix}").write_bytes(data)
        (source / f"{number:05}.txt").write_text(f"number {number}", "utf-8")
    report = build_shards(source, out)
    assert report is not None and report.kept + report.rejected == report.total == count
    names = [sample.key for sample in Shards(out) if open_image(sample.image)]
    lines = (out / "rejected.jsonl").read_text("utf-8").splitlines()
    assert len(set(names)) == report.kept and len(lines) == report.rejected
    assert report.kept and report.rejected and set(report.reasons) == {"unreadable image"}


def test_mutated_images_are_kept_or_rejected_by_name(tmp_path: Path) -> None:
    _fuzz(tmp_path, 200, seed=0)


@pytest.mark.slow
def test_many_mutated_images_are_kept_or_rejected_by_name(tmp_path: Path) -> None:
    _fuzz(tmp_path, 2000, seed=1)
