"""For tests of ``data build``: a folder of good and bad photos, and readers of the result."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.data.verify import check


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (16, 12)) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def photo_folder(folder: Path) -> Path:
    """A source of 14 samples: 7 good, 7 bad."""
    (folder / "sub.dir").mkdir(parents=True)
    images = {
        "a.jpg": picture(0, "JPEG"),
        "b.v2.png": picture(1),
        "c.webp": picture(2, "WEBP"),
        "sub.dir/a.jpg": picture(3, "JPEG"),
        "dög ß.JPG": picture(4, "JPEG"),
        "e.jpg": picture(5, "JPEG"),
        "e.png": picture(6),
        "broken.jpg": picture(7, "JPEG")[:300],
        "empty.png": b"",
        "silent.jpg": picture(8, "JPEG"),
        "badjson.jpg": picture(9, "JPEG"),
        "animation.gif": picture(10, "GIF"),
        "surrogate.jpg": picture(11, "JPEG"),
    }
    for name, data in images.items():
        (folder / name).write_bytes(data)
        if name not in ("silent.jpg", "badjson.jpg", "surrogate.jpg", "animation.gif", "c.webp"):
            (folder / name).with_suffix(".txt").write_text(f" caption of {name}\n", "utf-8")
    (folder / "e.txt").write_text("caption of e", "utf-8")
    record = {"caption": "caption of c.webp", "license": "CC0", "label": 3, "qa": [["q", "a"]]}
    (folder / "c.json").write_text(json.dumps(record))
    (folder / "badjson.json").write_text("{")
    (folder / "surrogate.json").write_text('{"caption": "\\ud800"}')
    (folder / "orphan.txt").write_text("no image here")
    (folder / "notes.md").write_text("not a sample")
    (folder / ".hidden.jpg").write_bytes(b"")
    return folder


def samples(out: Path, split: str | None = None) -> dict[str, Sample]:
    assert list(check(out)) == []
    return {sample.key: sample for sample in Shards(out, split)}


def rejected(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {Path(line["sample"]).name: line["reason"] for line in lines}


def hashes(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def by_caption(out: Path) -> dict[str, Sample]:
    return {sample.record["captions"][0]: sample for sample in samples(out).values()}


def tar_of(path: Path, members: Mapping[str, bytes], mode: Any = "w") -> Path:
    """Write a tar. Names may have bytes that are not UTF-8, as ``surrogateescape``."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
