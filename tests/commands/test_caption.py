"""`multimodal caption` and `info` on files of every kind, good and broken, and caption metrics."""

import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multimodal
from multimodal.api import Model
from multimodal.cli import main
from multimodal.commands.caption import line
from multimodal.eval.metrics.captioning import score_captions


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    rgb = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, rows: int) -> bytes:
    """A PNG with correct checksums whose header gives more rows than there are."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress((b"\0" + b"\x40" * 3 * width) * rows)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def good_files(folder: Path) -> dict[str, Path]:
    """Images of every format and mode that can be read."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    palette = picture(mode="P")
    palette.info["transparency"] = 3
    grey16 = Image.fromarray((np.arange(1200).reshape(30, 40) * 54).astype(np.uint16))
    transparent = picture(mode="RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((40, 30)))
    frames = [picture(), picture().rotate(90)]
    contents = {
        "plain.png": encoded(picture()),
        "cmyk.jpg": encoded(picture(mode="CMYK"), "JPEG"),
        "grey16.png": encoded(grey16),
        "palette.png": encoded(palette, transparency=3),
        "rgba.png": encoded(transparent),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated.png": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "rotated.jpg": encoded(picture(), "JPEG", exif=rotated.tobytes()),
    }
    return written(folder, contents)


def bad_files(folder: Path) -> dict[str, Path]:
    """Files that cannot be read as images, each for another reason."""
    png, jpeg = encoded(picture()), encoded(picture(200, 200), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0x10
    contents = {
        "flipped.png": bytes(flipped),
        "rows_missing.png": png_of(40, 30, 11),
        "truncated.png": png[:-30],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "text.jpg": b"not an image, but a letter\n",
        "empty.jpg": b"",
        "huge.png": png_of(20_000, 20_000, 1),
    }
    paths = written(folder, contents)
    (folder / "folder.jpg").mkdir()
    return paths | {"missing": folder / "missing.jpg", "folder": folder / "folder.jpg"}


def written(folder: Path, contents: dict[str, bytes]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in contents}


@pytest.mark.parametrize("batch_size", ["3", "32"])
@pytest.mark.parametrize("as_json", [False, True])
def test_good_and_bad_files_in_one_call(
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
    batch_size: str,
) -> None:
    good, bad = good_files(tmp_path / "a"), bad_files(tmp_path / "b")
    # Alternating, so that every batch has both. The last ones are all bad.
    order = [p for pair in zip(good.values(), bad.values(), strict=False) for p in pair]
    order += [path for path in bad.values() if path not in order]
    model = ["--model", str(tiny_model_folder), "--batch-size", batch_size, "--max-tokens", "8"]
    arguments = ["caption", *map(str, order), *model, *(["--json"] if as_json else [])]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    if as_json:
        records = [json.loads(row) for row in out.splitlines()]
        assert {tuple(record) for record in records} == {("image", "caption")}
        shown = [(record["image"], record["caption"]) for record in records]
    else:
        shown = [tuple(row.split("\t")) for row in out.splitlines()]
    assert [path for path, _ in shown] == [str(p) for p in order if p in good.values()]
    expected = multimodal.load(tiny_model_folder).caption(
        [str(path) for path, _ in shown], max_tokens=8
    )
    if not as_json:
        expected = [line("", caption, as_json=False)[1:] for caption in expected]
    assert [caption for _, caption in shown] == expected
    errors = err.splitlines()
    assert len(errors) == len(bad) and "Traceback" not in err
    # Folders are read first, so theirs come first.
    wrong = sorted((p for p in order if p in bad.values()), key=lambda path: not path.is_dir())
    for path, error in zip(wrong, errors, strict=True):
        assert error.startswith(f"multimodal caption: error: {path}: ")


def test_all_good_is_status_0_and_nothing_on_stderr(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in good_files(tmp_path / "a").values()]
    arguments = ["caption", "--model", str(tiny_model_folder), "--max-tokens", "4"]
    assert main([*arguments, *paths, "--dtype", "bfloat16", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(paths) and err == ""


def test_paths_bytes_and_images_of_one_picture_get_the_same_caption(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = multimodal.load(tiny_model_folder)
    path = written(tmp_path / "a", {"plain.png": encoded(picture())})["plain.png"]
    captions = model.caption([path, str(path), path.read_bytes(), picture()], max_tokens=8)
    assert len(set(captions)) == 1
    # EXIF says that it is turned. The caption is that of the upright image.
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    pair = model.caption([encoded(turned, exif=exif.tobytes()), picture()], max_tokens=8)
    assert pair[0] == pair[1]


def test_caption_refuses_wrong_arguments(tiny_model_folder: Path) -> None:
    model = multimodal.load(tiny_model_folder)
    assert model.caption([]) == []
    with pytest.raises(ValueError, match="cat.jpg: no such file"):
        model.caption("cat.jpg")
    with pytest.raises(ValueError, match="images: int is no image"):
        model.caption(3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="image 1: the file is empty"):
        model.caption([encoded(picture()), b""])
    with pytest.raises(ValueError, match="batch_size=0"):
        model.caption([picture()], batch_size=0)
    with pytest.raises(ValueError, match="max_tokens=0: expected at least 1"):
        model.caption([picture()], max_tokens=0)


def test_folders_and_lists_stand_for_their_images(
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [str(path) for path in good_files(tmp_path / "a").values()]
    text = "\n".join(paths) + "\n\n"
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    line = ["caption", "--model", str(tiny_model_folder), "--max-tokens", "2"]
    (tmp_path / "wide.txt").write_text(text, "utf-16")
    shown, listed, wide = [], f"@{tmp_path / 'list.txt'}", f"@{tmp_path / 'wide.txt'}"
    for names in ([str(tmp_path / "a")], [listed], [wide], ["-"], paths):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main([*line, *names]) == 0
        shown.append(sorted(capsys.readouterr().out.splitlines()))
    assert len(shown[0]) == len(paths) and shown == [shown[0]] * 5
    assert main([*line, f"{listed}.no"]) == 1
    assert "list.txt.no: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red bus", "p.jpg\ta red bus"),
        ("two\nlines\r\nand\ta tab\u2028end", "p.jpg\ttwo lines and a tab end"),
        ("", "p.jpg\t"),
    ],
)
def test_a_caption_is_one_line(caption: str, expected: str) -> None:
    assert line("p.jpg", caption, as_json=False) == expected
    row = line("p.jpg", caption, as_json=True)
    assert "\n" not in row and json.loads(row) == {"image": "p.jpg", "caption": caption}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes")
def test_paths_are_printed_with_the_bytes_they_were_given_with(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    name = tmp_path / "caf\udce9 \u65e5\u672c.png"
    name.write_bytes(encoded(picture()))
    command = [sys.executable, "-m", "multimodal.cli", "caption", "./" + name.name]
    command += ["--model", str(tiny_model_folder), "--max-tokens", "2"]
    run = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(b"./caf\xe9 \xe6\x97\xa5\xe6\x9c\xac.png\t")


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--model", "nowhere"], 1, "nowhere: no such model folder"),
        (["--model", "."], 1, ".: not a model folder (config.json is missing)"),
        (["--model", "MODEL", "--device", "cuda:99"], 1, "--device cuda:99: cannot be used here"),
        (["--model", "MODEL", "--batch-size", "0"], 1, "--batch-size 0: expected at least 1"),
        (
            ["--model", "MODEL", "--max-tokens", "9999"],
            1,
            "9999 more: the model reads at most 4096",
        ),
        (["--model", "MODEL", "--dtype", "int4"], 2, "invalid choice: 'int4'"),
    ],
)
def test_wrong_use_is_reported_in_one_line(
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat.png").write_bytes(encoded(picture()))
    options = [str(tiny_model_folder) if option == "MODEL" else option for option in options]
    try:
        code: object = main(["caption", "cat.png", *options])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (status, "") and message in err.splitlines()[-1]
    assert "Traceback" not in err and (status == 2 or len(err.splitlines()) == 1)


def test_a_damaged_model_is_reported_in_one_line(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_file(name: str, content: bytes | None) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_model_folder, folder)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        assert main(["caption", "--model", str(folder), "cat.png"]) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert str(folder) in error and len(error) < 400
        return error

    for name in ("model.safetensors", "heads.safetensors", "text_tokenizer.json"):
        break_file(name, b"\0" * 50)
        break_file(name, None)
    break_file("config.json", b"{}")
    break_file("config.json", b'{"format": 1}')
    break_file("image_tokenizer/config.json", None)
    break_file("image_tokenizer/model.safetensors", b"short")


def test_using_a_model_imports_no_training_code(tiny_model_folder: Path) -> None:
    code = f"""
import sys, multimodal
from PIL import Image
multimodal.load({str(tiny_model_folder)!r}).caption([Image.new("RGB", (9, 9))], max_tokens=2)
heavy = {{"lightning", "transformers", "open_clip", "webdataset", "torchmetrics", "tensorboard"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- info -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "image_tokenizer"])
def test_info_verifies_fingerprints(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    folder = tiny_model_folder / part
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(value.endswith("(verified)") for value in facts["fingerprints"].values())
    assert facts["images"] == {
        "size": 32,
        "fit": "squash",
        "tokens per image": 16,
        "levels": {"detail": "4 x 4 x 1 of 64"},
        "codes": multimodal.load(tiny_model_folder).image_tokenizer.codes_fingerprint,
    }
    assert facts["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if not part:
        model = multimodal.load(folder)
        assert facts["vocabulary"] == {
            "text": 300,
            "specials": 7,
            "image codes": 64,
            "size with padding": 384,
        }
        counts = facts["parameters"]
        parts = (model.network, model.image_tokenizer)
        expected = sum(p.numel() for part in parts for p in part.parameters())
        assert expected == sum(counts.values()) - counts["of which embedding"]
    assert main(["info", str(folder)]) == 0
    assert "(verified)" in capsys.readouterr().out


def test_info_notices_other_weights(
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Callable[..., Model],
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    tiny_model(seed=0, noise=0.2).save(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "model")
    assert main(["info", str(tmp_path / "model")]) == 1
    assert "MISMATCH" in capsys.readouterr().out


def test_info_of_the_installation_and_of_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["multimodal"] == multimodal.__version__ and {"cpu", "auto"} <= {*facts["devices"]}
    assert main(["info", str(tmp_path)]) == 1
    assert "neither a model folder" in capsys.readouterr().err


# --- the metrics ------------------------------------------------------------------------------

TRUTHS = {
    "a": ["A red bus drives in the snow.", "a bus in winter on a street"],
    "b": ["Two dogs run on the beach!", "dogs play in the sand by the sea"],
    "c": ["a man rides a horse over a hill", "someone is riding on horseback"],
}


def test_identical_captions_score_highest() -> None:
    perfect = score_captions({key: texts[0] for key, texts in TRUTHS.items()}, TRUTHS)
    for number in range(1, 5):
        assert perfect[f"Bleu_{number}"] == pytest.approx(1, abs=1e-6)
    swapped = {"a": TRUTHS["b"][0], "b": TRUTHS["c"][0], "c": TRUTHS["a"][0]}
    wrong = score_captions(swapped, TRUTHS)
    assert perfect["CIDEr"] > 1 > 0.2 > wrong["CIDEr"]
    one_each = {key: texts[:1] for key, texts in TRUTHS.items()}
    alone = score_captions({key: texts[0] for key, texts in one_each.items()}, one_each)
    assert alone["CIDEr"] == pytest.approx(10)  # the maximum: the cosine is 1 for every n


def test_bleu_by_hand() -> None:
    # "the cat sat" against "the cat stood": 2 of 3 words, 1 of 2 pairs, the same length.
    scores = score_captions({"x": "the cat sat"}, {"x": ["The cat, stood."]})
    assert scores["Bleu_1"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["Bleu_2"] == pytest.approx((2 / 3 * 1 / 2) ** 0.5, abs=1e-6)


def test_scores_need_the_same_images() -> None:
    with pytest.raises(ValueError, match="predictions and references have different images"):
        score_captions({"a": "x", "d": "y"}, TRUTHS)
    with pytest.raises(ValueError, match="no captions to score"):
        score_captions({}, {})


def test_empty_and_foreign_captions_are_scored_not_refused() -> None:
    truths = {"x": ["a cat"], "y": ["a dog", "a dog"], "z": ["漢字 の 猫"]}
    scores = score_captions({"x": "", "y": "a dog", "z": "漢字 の 猫"}, truths)
    images = scores["per_image"]
    assert images["x"]["CIDEr"] == images["x"]["ROUGE_L"] == 0
    assert images["y"]["ROUGE_L"] == images["z"]["ROUGE_L"] == pytest.approx(1)
    assert scores["ROUGE_L"] == pytest.approx(2 / 3)
    assert scores["CIDEr"] == pytest.approx(sum(i["CIDEr"] for i in images.values()) / 3)
    with pytest.raises(ValueError, match="no reference has a word"):
        score_captions({"x": "a cat"}, {"x": ["..."]})
    with pytest.raises(ValueError, match="no reference for x"):
        score_captions({"x": "a cat"}, {"x": []})
