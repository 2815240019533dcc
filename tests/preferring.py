"""What tests of preference training share: shards with preferences, and their recipe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from multimodal.cli import main
from multimodal.data.shards import Shards, write_tar
from tests.launches import logged

Records = Callable[[list[dict[str, Any]], int], dict[str, Any]]


def preferring(work: Path, out: Path, change: Records) -> Path:
    """The scenes with what ``change`` makes of their records, given all of them and a number."""
    out.mkdir()
    for split in ("train", "val"):
        samples = list(Shards(work / "scenes", split))
        records = [sample.record for sample in samples]
        changed = [change(records, number) for number in range(len(samples))]
        members = [
            {**sample.members, "json": json.dumps(record).encode()}
            for sample, record in zip(samples, changed, strict=True)
        ]
        keys = [sample.key for sample in samples]
        write_tar(out / f"{split}-0000.tar", zip(keys, members, strict=True))
    assert main(["data", "index", str(out)]) == 0
    return out


def recipe(work: Path, folder: Path, data: list[Path], **arguments: Any) -> Path:
    config = yaml.safe_load((work / "joint.yaml").read_text())
    config["model"]["class_path"] = "multimodal.train.preferences.module.PreferenceModule"
    config["model"]["init_args"] |= arguments
    config["data"]["folders"] = [str(each) for each in data]
    path = folder / "prefer.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def values(run: Path, name: str) -> list[float]:
    return [float(value) for value in logged(run, name).values()]
