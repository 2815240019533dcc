"""`multimodal caption` and `embed` under torchrun: what one process writes, shared by the ranks."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch.distributed as dist

from multimodal.cli import main
from multimodal.distributed import SharedWork
from tests.launches import Ended, run_processes, torchrun
from tests.photos import photo_folder

pytestmark = pytest.mark.usefixtures("one_thread")


def without_ranks(text: str) -> str:
    return re.sub(r" \(rank \d of \d\)", "", text)


def on_ranks(command: list[str], ranks: int) -> list[Ended]:
    return run_processes(command, environments=torchrun(ranks))


def test_captions_are_those_of_one_process_in_order(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn at random: by the number of an image in the list, whichever rank does it."""
    photos = photo_folder(tmp_path / "photos")
    command = ["caption", "--model", str(tiny_model_folder), str(photos), "--batch-size", "3"]
    command += ["--max-tokens", "6", "--temperature", "1.0", "--seed", "4"]
    assert main([*command, "--threads", "1"]) == 1
    alone = capsys.readouterr()
    assert len(set(alone.out.splitlines())) > 6, "three batches or more"
    first, *others = on_ranks(command, 3)
    assert first.stdout == alone.out and first.status == 1
    assert without_ranks(first.stderr) == alone.err
    assert {(end.status, end.stdout, end.stderr) for end in others} == {(0, "", "")}


def test_embeddings_are_those_of_one_process(tiny_model_folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"a {word} dog\n" for word in "red blue old young wet".split()) + "\n")
    files = {}
    for name in ("alone", "shared"):
        out = tmp_path / f"{name}.npy"
        command = ["embed", "--model", str(tiny_model_folder), "--text", str(lines)]
        command += ["--batch-size", "2", "--out", str(out)]
        if name == "alone":
            assert main([*command, "--threads", "1"]) == 1
        else:
            assert [end.status for end in on_ranks(command, 2)] == [1, 0]
        files[name] = [out.read_bytes(), out.with_suffix(".jsonl").read_bytes()]
    assert files["alone"] == files["shared"]


def fail_on_the_last_rank() -> None:
    from multimodal.api import Model

    def broken(*_: object, **__: object) -> None:
        raise ValueError("no more disk")

    if os.environ["RANK"] == "1":
        Model.caption_each = broken  # type: ignore[assignment,method-assign]


def test_a_rank_that_fails_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    command = ["caption", "--model", str(tiny_model_folder), str(photos), "--batch-size", "3"]
    first, second = run_processes(
        [*command, "--max-tokens", "2"],
        environments=torchrun(2),
        before=fail_on_the_last_rank,
    )
    assert (first.status, second.status) == (1, 1)
    said = "multimodal caption (rank 0 of 2): error: rank 1 of 2 has failed: no more disk"
    assert first.stderr.splitlines()[-1] == said
    assert second.stderr == "multimodal caption (rank 1 of 2): error: no more disk\n"


class EndsBetweenLooks(dist.HashStore):  # type: ignore[misc,name-defined]
    """The other rank puts its last result and ends right after a look for that result."""

    def check(self, keys: list[str]) -> bool:
        found: bool = super().check(keys)
        if keys == ["1"] and not found:
            self.set("1", pickle.dumps(["c", "d"]))
            self.set("end/1", pickle.dumps(None))
        return found


def test_a_rank_that_ends_while_the_first_looks_has_not_failed() -> None:
    shared = SharedWork()
    shared.rank, shared.ranks, shared._store = 0, 2, EndsBetweenLooks()
    assert list(shared.map_batches("abcd", 2, lambda batch, _: batch)) == list("abcd")


@pytest.mark.parametrize("command", [["draw", "a cat"], ["edit", "cat.png", "--prompt", "a dog"]])
def test_what_ranks_do_not_share_is_refused(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each rank would draw all images, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    more = ["--vary", "0.5"] if command[0] == "edit" else []
    out = tmp_path / "out.png"
    assert main([*command, *more, "--model", "no/such/folder", "--out", str(out)]) == 1
    assert f"WORLD_SIZE=2: {command[0]} is the work of one process" in capsys.readouterr().err
    assert not out.exists()
