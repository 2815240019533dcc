"""``data build`` and ``data index`` read the same records from shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from multimodal.api import Model
from multimodal.cli import main
from multimodal.data.builder.build import build_shards
from multimodal.data.encode import Encoding, encode_shards
from multimodal.data.indexing import index_folder
from multimodal.data.samples import has_text, plain, record_of, texts_of
from multimodal.data.shards import Shards
from multimodal.files import UnreadableText
from tests.photos import picture, samples, tar_of

RECORDS: dict[str, dict[str, bytes]] = {
    "txt": {"txt": b"a dog\n"},
    "lines": {"txt": b"a dog\n\na brown dog\r\n"},
    "img2dataset": {"txt": b"a dog", "json": b'{"caption": "a dog", "url": "u", "width": 3}'},
    "no caption": {"txt": b"a dog", "json": b'{"caption": null, "url": "u"}'},
    "captions": {"json": b'{"captions": ["a dog", " ", "a cat "]}'},
    "null": {"json": b'{"captions": null, "qa": [["so?", "no"]]}'},
    "nulls": {"json": b'{"captions": null, "caption": null, "text": "a dog", "qa": null}'},
    "list": {"json": b'["a dog", "a cat"]'},
    "bom": {"json": b'\xef\xbb\xbf{"text": "a dog"}'},
    "bom txt": {"txt": b"\xef\xbb\xbfa dog"},
    "utf16": {"txt": "a dög".encode("utf-16")},
    "nan": {"json": b'{"caption": "a dog", "similarity": NaN, "x": [Infinity]}'},
    "cls": {"cls": b"7\n"},
    "cls and txt": {"cls": b"7", "txt": b"a dog"},
    "qa": {"json": b'{"caption": "a dog", "qa": [["", "yes"], ["is it?", " "], ["so?", "no"]]}'},
    "question": {"json": b'{"question": "so?", "answer": "no"}'},
    "llava": {
        "json": b'{"conversations": [{"from": "human", "value": "so?"},'
        b'{"from": "gpt", "value": "no"}]}'
    },
    "not utf8": {"txt": b"\xff"},
    "not json": {"json": b"{"},
    "number": {"json": b"3"},
    "captions of numbers": {"json": b'{"captions": [1]}'},
    "surrogate": {"json": b'{"caption": "\\ud800"}'},
    "deep": {"json": b"[" * 5000 + b"]" * 5000},
    "digits": {"json": b'{"caption": "a", "n": %s}' % (b"9" * 5000)},
    "none": {},
}  # fmt: skip


def test_build_and_index_read_the_same_records(tmp_path: Path) -> None:
    members = {"README": b"read me", "./.DS_Store": b"x", "__MACOSX/._txt.png": b"\0\5\x16\7"}
    for number, (name, texts) in enumerate(RECORDS.items()):
        key = name.replace(" ", "_")
        for suffix, data in {"png": picture(number), **texts}.items():
            members |= {f"._{key}.{suffix}": b"\0\5\x16\7", f"{key}.{suffix}": data}
    folder = tmp_path / "s"
    tar = tar_of(folder / "train-0.tar", members)
    report = build_shards(folder, tmp_path / "out", need_text=False)
    records = {key: sample.record for key, sample in samples(tmp_path / "out").items()}
    index_folder(folder)
    indexed: dict[str, Any] = {}
    for sample in Shards(folder):
        try:
            indexed[sample.key] = sample.record
        except ValueError as error:
            assert f"sample {sample.key}" in str(error)
    assert {key: plain(record) for key, record in indexed.items()} == records
    refused = {
        "not_utf8",
        "not_json",
        "number",
        "captions_of_numbers",
        "surrogate",
        "deep",
        "digits",
    }
    assert {n.replace(" ", "_") for n in RECORDS} - indexed.keys() == refused
    assert report is not None and report.rejected == len(refused)
    # webdataset is the reference for which members a sample has.
    own = {sample.key: dict(sample.members) for sample in Shards(folder)}
    theirs = {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")}
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
    }
    theirs.pop("__MACOSX/", None)  # webdataset takes the part behind the first dot for a suffix
    assert own == theirs
    assert main(["data", "check", str(folder)]) == 0


def test_member_names_that_are_not_utf8_are_indexed_and_built(tmp_path: Path) -> None:
    names = [b"d\xf6g", b"d\xfcg", b"d\xc3\xb6g"]
    members = {}
    for number, raw in enumerate(names):
        name = raw.decode(errors="surrogateescape")
        members |= {f"{name}.png": picture(number), f"{name}.txt": b"%d" % number}
    tar_of(tmp_path / "s/x-0.tar", members)
    build_shards(tmp_path / "s", tmp_path / "out")
    built = samples(tmp_path / "out").values()
    assert sorted(s.record["captions"] for s in built) == [["0"], ["1"], ["2"]]
    index_folder(tmp_path / "s")
    assert {s.record["captions"][0] for s in Shards(tmp_path / "s")} == {"0", "1", "2"}
    assert main(["data", "check", str(tmp_path / "s"), "--decode"]) == 0


def test_index_and_check_say_when_no_sample_has_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members: dict[str, bytes] = {}
    for number in range(3):
        members |= {f"{number}.png": picture(number), f"{number}.json": b'{"url": "u"}'}
    members |= {"3.png": picture(3), "3.txt": b"one\ntwo"}
    tar_of(tmp_path / "s/x-0.tar", members)
    assert main(["data", "index", str(tmp_path / "s")]) == 0
    error = capsys.readouterr().err
    assert "of the first 4 samples, 3: samples have no caption, question or label" in error
    assert "of the first 4 samples, 1: .txt of several lines: each line is a caption" in error
    assert main(["data", "check", str(tmp_path / "s"), "--decode"]) == 0
    assert "3: samples have no caption, question or label" in capsys.readouterr().err


FIELDS = (
    *("captions", "caption", "text", "qa", "question", "answer", "label", "conversations"),
    *("messages", "texts", "content", "preferences", "license", "scene"),
)
VALUES: list[Any] = [
    *(None, 3, -1.5, True, "", " ", "x", [], {}, [None], ["x"], [["x"]], [["x", None]]),
    *({"a": 1}, [{"a": 1}], [{"question": "x", "answer": None}], 10**30),
]


@pytest.mark.parametrize("field", FIELDS)
def test_a_record_has_texts_or_is_refused_whatever_stands_in_a_field(field: str) -> None:
    """Who reads a record need not check the types of its texts again."""
    for value in VALUES:
        fields = {"captions": ["a dog"], "qa": [["so?", "no"]], field: value}
        for given in (fields, {field: value}):
            try:
                record = record_of({"json": json.dumps(given).encode()})
            except UnreadableText:
                continue
            assert all(isinstance(text, str) and text.strip() for text in record["captions"])
            assert all(isinstance(text, str) for text in texts_of(record)), record
            assert has_text(record) in (True, False)


def test_one_unreadable_record_ends_no_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members: dict[str, bytes] = {}
    for number, text in enumerate((b"a dog runs", b"\xff", b"a cat sleeps")):
        members |= {f"{number}.png": picture(number), f"{number}.txt": text}
    tar_of(tmp_path / "s/train-0.tar", members)
    index_folder(tmp_path / "s")
    tokenizer = str(tmp_path / "t.json")
    source = str(tmp_path / "s")
    assert main(["tokenizer", "text", source, "--out", tokenizer, "--vocabulary-size", "300"]) == 0
    output = capsys.readouterr()
    assert "from 2 texts" in output.out and "left out: sample 1: its text" in output.err
    assert main(["data", "questions", source, str(tmp_path / "asked")]) == 0
    asked = {sample.key: sample for sample in Shards(tmp_path / "asked")}
    assert len(asked["0"].record["qa"]) == 2 and asked["1"].members["txt"] == b"\xff"


def test_codes_keep_all_that_a_record_is_made_of(
    tmp_path: Path, tiny_model: Callable[..., Model]
) -> None:
    members = {f"{name}.png": picture(ord(name)) for name in "abc"}
    members |= {"a.cls": b"7", "b.txt": b"a dog", "c.json": b'{"qa": [["so?", "no"]]}'}
    tar_of(tmp_path / "s/train-0.tar", dict(sorted(members.items())))
    index_folder(tmp_path / "s")
    tokenizer = tiny_model().image_tokenizer
    encode_shards(tmp_path / "s", tmp_path / "codes", tokenizer, Encoding.for_tokenizer(tokenizer))
    records = {sample.key: sample.record for sample in Shards(tmp_path / "codes")}
    assert records == {sample.key: sample.record for sample in Shards(tmp_path / "s")}
    assert records["a"]["label"] == "7"
