"""Whatever a table, a JSON file or a tar holds: each of its samples is kept or rejected by name.

Where a file as a whole cannot be read, the error is one line that names it. Nothing else happens.
"""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multimodal.data.builder.build import build_shards
from multimodal.data.builder.records import ReadOptions
from multimodal.data.builder.rows import read_lines, split_rows
from multimodal.data.builder.sources import read_source
from multimodal.data.formats.column_files import open_columns
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.files import UnreadableFile
from tests.photos import picture, tar_of

COUNT = 6
PICTURES = [picture(number, size=(4, 4)) for number in range(COUNT)]
NAMES = [f"{number}.png" for number in range(COUNT)]
TEXTS = [f"text number {number}, and more" for number in range(COUNT)]
TOKENS = [
    *(b'"', b'""', b"\n", b"\r", b"\t", b",", b"|", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe"),
    *(b"NaN", b"Infinity", b"null", b"{", b"}", b"[" * 3000, b"\\ud800", b"9" * 5000, b"1e999"),
    *(b"../", b"/etc/passwd", b"://", b"<image>", b"\xe2\x80\xa8", b"0.png", b":", b"'", b"#0"),
]
VALUES: list[Any] = [None, 3, -1, 2.5, "", " ", "x", "0.png", [], {}, [None], ["x"], True, [[]]]


def delimited(delimiter: str, header: bool = True) -> bytes:
    rows = [("image", "caption", "n"), *zip(NAMES, TEXTS, "012345", strict=True)]
    rows = rows if header else [row[:2] for row in rows[1:]]
    quote = '"' if delimiter == "," else ""
    lines = [delimiter.join(f"{quote}{cell}{quote}" for cell in row) for row in rows]
    return "\n".join(lines).encode()


def entries() -> list[dict[str, Any]]:
    pairs = zip(NAMES, TEXTS, strict=True)
    return [{"image": name, "caption": text, "score": 0.5} for name, text in pairs]


def conversations() -> list[dict[str, Any]]:
    said = [("human", "<image>\nWhat is it?"), ("gpt", "a dog"), ("human", "So?"), ("gpt", "no")]
    turns = [{"from": speaker, "value": text} for speaker, text in said]
    return [{"id": n, "image": name, "conversations": turns} for n, name in enumerate(NAMES)]


def annotations() -> dict[str, Any]:
    return {
        "images": [{"id": n, "file_name": name, "license": 1} for n, name in enumerate(NAMES)],
        "annotations": [{"image_id": n, "caption": text} for n, text in enumerate(TEXTS)],
        "licenses": [{"id": 1, "name": "CC0"}],
    }


def karpathy() -> dict[str, Any]:
    return {
        "images": [
            {"filename": name, "split": "val" if n else "train", "sentences": [{"raw": text}]}
            for n, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True))
        ]
    }


def questions() -> dict[str, Any]:
    pairs = zip(NAMES, TEXTS, strict=True)
    return {"questions": [{"image": n, "question": t, "answer": "yes"} for n, t in pairs]}


def documents() -> list[dict[str, Any]]:
    pairs = zip(NAMES, TEXTS, strict=True)
    return [{"content": [{"text": t}, {"image": n}, {"text": "end"}], "n": 1} for n, t in pairs]


def parquet(folder: Path, image: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image": image, "text": TEXTS, "n": list(range(COUNT))}
    pq.write_table(pa.table(columns), folder / "x", row_group_size=2)
    return (folder / "x").read_bytes()


def arrow(image: list[Any], as_file: bool = False) -> bytes:
    """In batches of two rows, as ``save_to_disk`` of Hugging Face's datasets has them."""
    import pyarrow as pa

    table, sink = pa.table({"image": image, "text": TEXTS, "n": list(range(COUNT))}), io.BytesIO()
    with (pa.ipc.new_file if as_file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, 2)
    return sink.getvalue()


def tar(folder: Path) -> bytes:
    members = {}
    for number, (data, text) in enumerate(zip(PICTURES, TEXTS, strict=True)):
        members |= {f"{number}.png": data, f"{number}.txt": text.encode()}
    return tar_of(folder / "x", members).read_bytes()


JSON: dict[str, Callable[[], Any]] = {
    "list.json": entries,
    "llava.json": conversations,
    "coco.json": annotations,
    "karpathy.json": karpathy,
    "vqa.json": questions,
    "by_name.json": lambda: dict(zip(NAMES, TEXTS, strict=True)),
    "rows.jsonl": entries,
    "documents.jsonl": documents,
    "metadata.jsonl": lambda: [{"file_name": e["image"], "text": e["caption"]} for e in entries()],
    "0.json": lambda: {"captions": TEXTS[:2], "qa": [["who?", "me"]], "similarity": 0.3},
}
BYTES: dict[str, Callable[[Path], bytes]] = {
    "t.csv": lambda folder: delimited(","),
    "t.tsv": lambda folder: delimited("\t"),
    "t.txt": lambda folder: delimited("|"),
    "t.token": lambda folder: delimited("\t", header=False),
    "files.parquet": lambda folder: parquet(folder, PICTURES),
    "paths.parquet": lambda folder: parquet(folder, [{"bytes": None, "path": n} for n in NAMES]),
    "files.arrow": lambda folder: arrow([{"bytes": data, "path": None} for data in PICTURES]),
    "paths.arrow": lambda folder: arrow([{"bytes": None, "path": name} for name in NAMES]),
    "file.arrow": lambda folder: arrow(PICTURES, as_file=True),
    "x-0.tar": tar,
    "x-0.tar.gz": lambda folder: gzip.compress(tar(folder), mtime=0),
    "0.txt": lambda folder: "\n".join(TEXTS).encode(),
}


def as_bytes(name: str, value: Any) -> bytes:
    if name.endswith(".jsonl") and isinstance(value, list):
        return "\n".join(json.dumps(row) for row in value).encode()
    return json.dumps(value).encode()


def mutated_json(value: Any, rng: random.Random) -> Any:
    """The value with one node replaced, left out or repeated."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if rng.random() < 0.1:
            if isinstance(value, list):
                return [*value, value[key]]
            return {k: v for k, v in value.items() if k != key}
        changed = mutated_json(value[key], rng)
        if isinstance(value, list):
            return [changed if n == key else item for n, item in enumerate(value)]
        return {k: changed if k == key else item for k, item in value.items()}
    return rng.choice(VALUES)


def mutated(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((1, 1, 3, 30, 600)))
        match rng.randrange(6):
            case 0 if data:
                flipped = bytearray(data)
                flipped[start % len(data)] ^= 1 << rng.randrange(8)
                data = bytes(flipped)
            case 1:
                data = data[:start]
            case 2:
                data = data[:start] + data[stop:]
            case 3:
                data = data[:stop] + data[start:]
            case 4:
                data = data[:start] + rng.choice(TOKENS) + data[start:]
            case _:
                data = data[:start] + rng.choice(TOKENS) + data[stop:]
    return data


def check_rows(table: Path) -> None:
    """Each line, entry or row of a table is in one sample, or is rejected, and not both."""
    items = [item for item in read_source(table, ReadOptions()) if item.rows is not None]
    numbers = sorted(n for item in items if item.rows is not None for n in item.rows.numbers)
    suffix = table.suffix
    if suffix == ".json":
        content = json.loads(table.read_text("utf-8-sig"))
        if isinstance(content, list):
            assert numbers == list(range(len(content)))
    elif suffix == ".parquet":
        import pyarrow.parquet as pq

        assert numbers == list(range(pq.ParquetFile(table).metadata.num_rows))
    elif suffix == ".arrow":
        file = open_columns(table)
        end = [sum(file.sizes)] * bool(file.problem)  # how many rows follow, nobody knows
        assert numbers == [*range(sum(file.sizes)), *end]
    else:
        lines = read_lines(table)
        filled = [
            n
            for n, line in enumerate(lines, 1)
            if line.strip("\r\n" if suffix != ".jsonl" else None)
        ]
        if suffix != ".jsonl" and any('"' in line for line in lines):
            return  # a cell may have several lines: see test_no_line_is_lost
        assert numbers in (filled, filled[1:])


def check(name: str, folder: Path, out: Path) -> bool:
    """Build from the file, or the folder, and check what must hold. Whether it could be read."""
    alone = name not in ("metadata.jsonl", "0.json", "0.txt")
    source = folder / name if alone else folder
    try:
        report = build_shards(source, out, val_share=0.1)
    except ValueError as error:
        # A value of another kind would be a bug: no encoding error, no error of a library.
        assert type(error) in (ValueError, UnreadableFile) and str(source) in str(error)
        assert "\n" not in str(error).strip()
        if "no sample could be used" in str(error):
            assert (out / "rejected.jsonl").is_file()
        return False
    assert report is not None and report.total == report.kept + report.rejected
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == report.rejected and all(
        line["sample"] and line["reason"] for line in lines
    )
    built = list(Shards(out))
    assert len(built) == report.kept
    if alone and not name.startswith("x-0"):
        check_rows(source)
    if name.startswith("x-0"):
        check_pairs(built)
    return True


def check_pairs(built: list[Sample]) -> None:
    """No image has the text of another one."""
    for sample in built:
        captions = sample.record["captions"]
        if sample.image in PICTURES and captions and captions[0] in TEXTS:
            assert TEXTS.index(captions[0]) == PICTURES.index(sample.image)


def run(tmp_path: Path, count: int, seed: int) -> None:
    rng, read = random.Random(seed), 0
    names = [*JSON, *BYTES]
    (tmp_path / "make").mkdir()
    made = {name: make(tmp_path / "make") for name, make in BYTES.items()}
    for number in range(count):
        name = names[number % len(names)]
        if name in JSON and rng.random() < 0.7:
            value = JSON[name]()
            for _ in range(rng.choice((1, 1, 2, 4))):
                value = mutated_json(value, rng)
            data = as_bytes(name, value)
        else:
            data = mutated(as_bytes(name, JSON[name]()) if name in JSON else made[name], rng)
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for image, content in zip(NAMES, PICTURES, strict=True):
            (folder / image).write_bytes(content)
        (folder / name).write_bytes(data)
        try:
            read += check(name, folder, tmp_path / f"{number}-out")
        except BaseException:
            print(f"input {number} of seed {seed}: {name}: {data[:2000]!r}")
            raise
    assert read > count / 3, "most mutations must reach the code behind the first check"


def test_200_mutated_sources(tmp_path: Path) -> None:
    run(tmp_path, 200, seed=0)


@pytest.mark.slow
def test_2000_mutated_sources(tmp_path: Path) -> None:
    run(tmp_path, 2000, seed=1)


def test_no_line_is_lost() -> None:
    """Between a row and the next one are the lines of its cells, and empty lines. Nothing else."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(
            rng.choices(['"', ",", "\n", "\n", "a", "b.png", "\r\n", '""', '"\n', ',"'], k=30)
        )
        lines = list(io.StringIO(text, newline=""))
        rows = list(split_rows(lines, ","))
        ends = [number for number, _ in rows[1:]] + [len(lines) + 1]
        assert not "".join(lines[: rows[0][0] - 1] if rows else lines).strip("\r\n")
        for (first, cells), end in zip(rows, ends, strict=True):
            own = 1 + sum(cell.count("\n") for cell in cells)
            assert own <= end - first
            assert not "".join(lines[first - 1 + own : end - 1]).strip("\r\n")
