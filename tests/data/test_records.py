"""``data build`` and ``data index`` read the same records from shards."""

from pathlib import Path
from typing import Any

import webdataset

from multimodal.cli import main
from multimodal.data.builder.build import build
from multimodal.data.indexing import index_folder
from multimodal.data.samples import plain
from multimodal.data.shards import Shards
from tests.photos import picture, samples, tar_of

RECORDS: dict[str, dict[str, bytes]] = {
    "txt": {"txt": b"a dog\n"},
    "lines": {"txt": b"a dog\n\na brown dog\r\n"},
    "img2dataset": {"txt": b"a dog", "json": b'{"caption": "a dog", "url": "u", "width": 3}'},
    "no caption": {"txt": b"a dog", "json": b'{"caption": null, "url": "u"}'},
    "captions": {"json": b'{"captions": ["a dog", " ", "a cat "]}'},
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
    report = build(folder, tmp_path / "out", need_text=False)
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
    build(tmp_path / "s", tmp_path / "out")
    built = samples(tmp_path / "out").values()
    assert sorted(s.record["captions"] for s in built) == [["0"], ["1"], ["2"]]
    index_folder(tmp_path / "s")
    assert {s.record["captions"][0] for s in Shards(tmp_path / "s")} == {"0", "1", "2"}
    assert main(["data", "check", str(tmp_path / "s"), "--decode"]) == 0
