"""Text files are UTF-8 in every locale, and names that are not UTF-8 are shown escaped."""

import ast
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from multimodal.cli import main
from multimodal.data.builder.build import build_shards
from multimodal.files import read_json, write_json
from multimodal.terminal import one_line, print_any_text, shown
from tests.photos import picture

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("multimodal", "tokenizers", "train", "eval", "benchmarks")


def without_encoding(source: str) -> Iterator[int]:
    """The lines that open a text file in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        value = getattr(node.func, "value", None)
        owner = getattr(value, "id", None) or getattr(value, "attr", None)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in keywords or owner in (
            "os",
            "Image",
            "Index",
            "fsspec",
            "tarfile",
            "webbrowser",
            "web",  # an OpenerDirector of urllib: bytes
            "cache",  # multimodal/data/remote/cache.py: bytes
        ):
            continue
        given = len(node.args)
        if name in ("read_text", "write_text"):
            # A function of that name, multimodal.files.read_text for instance, says its own.
            if isinstance(node.func, ast.Attribute) and given < (2 if name == "write_text" else 1):
                yield node.lineno
        elif name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
            at = 0 if name == "open" and isinstance(node.func, ast.Attribute) else 1
            at = 0 if name.endswith("TemporaryFile") else at
            mode = keywords.get("mode", node.args[at] if given > at else None)
            default = "w+b" if name.endswith("TemporaryFile") else "r"
            text = mode.value if isinstance(mode, ast.Constant) else default
            if "b" not in str(text):
                yield node.lineno
        elif name in ("run", "Popen", "check_output") and owner == "subprocess":
            if {"text", "universal_newlines"} & keywords.keys():
                yield node.lineno


def test_every_text_file_names_its_encoding() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in without_encoding(path.read_text("utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("p.read_text()", [1]),
        ("p.write_text(x)", [1]),
        ("p.read_text('utf-8'), p.write_text(x, 'utf-8')", []),
        ("read_text(p)", []),
        ("open(p)\nopen(p, 'w')\np.open()", [1, 2, 3]),
        ("open(p, 'rb'), open(p, 'w', encoding='utf-8'), p.open('wb'), Image.open(p)", []),
        ("NamedTemporaryFile('w')", [1]),
        ("NamedTemporaryFile(), subprocess.run(x)", []),
        ("subprocess.run(x, text=True)", [1]),
    ],
)
def test_the_guard_sees_every_way_to_open_a_text(source: str, lines: list[int]) -> None:
    assert list(without_encoding(source)) == lines


def test_what_is_not_utf8_is_shown_escaped() -> None:
    path = os.fsdecode(b"caf\xe9/\xe6\x97\xa5.jpg")
    assert shown(path) == r"caf\xe9/日.jpg"
    assert one_line(f"{path}\n\x1b[2J \ud800") == r"caf\xe9/日.jpg \x1b[2J \ud800"


def test_stdout_takes_every_text_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (
        ("utf-8", "dög 日 ".encode() + b"\xff \\ud800"),
        ("latin-1", b"d\xf6g \\u65e5 \xff \\ud800"),
        ("ascii", b"d\\xf6g \\u65e5 \xff \\ud800"),
    ):
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
        print_any_text()
        print("dög 日 \udcff \ud800", end="", flush=True)
        assert buffer.getvalue() == expected


def test_json_holds_names_that_are_not_utf8(tmp_path: Path) -> None:
    value = {"name": "\udcff 日", "lone": "\ud800"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "a.json").read_text("utf-8")  # and is UTF-8


def test_folders_with_names_that_are_not_utf8_are_built_and_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest's own stdout takes no bytes that are not UTF-8, as they go out here.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    source, out = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9", b"o\xff"))
    try:
        source.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    name = os.fsdecode(b"p\xfe")
    (source / f"{name}.jpg").write_bytes(picture(0, "JPEG"))
    (source / f"{name}.txt").write_text("日", "utf-8")
    (source / os.fsdecode(b"bad\xfe.jpg")).write_bytes(b"")
    (source / os.fsdecode(b"bad\xfe.txt")).write_text("x", "utf-8")
    report = build_shards(source, out)
    assert report is not None and (report.kept, report.rejected) == (1, 1)
    assert read_json(out / "manifest.json")["source"] == str(tmp_path / r"caf\xe9")
    (line,) = (out / "rejected.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["sample"] == str(tmp_path / r"caf\xe9" / r"bad\xfe.jpg")
    page = tmp_path / "page.html"
    for verb in (["info", str(out)], ["data", "check", str(out)], ["data", "report", str(out)]):
        assert main([*verb, *(["--out", str(page)] if "report" in verb else [])]) == 0, verb
    assert r"caf\xe9" in page.read_text("utf-8")
    (out / "train-0000.tar").unlink()
    capsys.readouterr()
    assert main(["data", "check", str(out)]) == 1
    assert r"o\xff/train-0000.tar: missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "count", "named"),
    [
        ("a dog\r\ncaf\u00e9\n\n".encode(), 3, ""),
        (b"\xef\xbb\xbfa dog\rtwo cats\n\xff", 2, "line 2: not UTF-8"),
        (b"caf\xe9\n" * 3 + b"a dog", 1, "3 lines that are not UTF-8"),
        ("a dog\n\u72ac\n".encode("utf-16"), 2, ""),
    ],
)
def test_lines_that_are_not_utf8_do_not_end_the_training_of_a_tokenizer(
    data: bytes, count: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_bytes(data)
    texts = ["tokenizer", "text", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "t.json")]
    assert main([*texts, "--vocabulary-size", "256"]) == 0
    output = capsys.readouterr()
    assert f"from {count} texts" in output.out
    assert ("texts.txt" in output.err) == bool(named) and named in output.err
