"""The report about shard folders has the right numbers."""

import json
import re
from pathlib import Path

import pytest

from multimodal.cli import main
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards, index_shard, write_manifest, write_tar
from multimodal.eval.data_report import FolderStats


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scenes, and a small folder with a copy in another split and a damaged image."""
    work = tmp_path_factory.mktemp("report")
    scenes, mine = work / "scenes", work / "mine"
    assert main(["data", "scenes", str(scenes), "--count", "30", "--size", "40"]) == 0
    mine.mkdir()
    images = [sample.image for sample in Shards(scenes, "train")][:6]
    records = [{"captions": [f"the zebra number {n}", "a"], "license": "CC0"} for n in range(6)]
    records[3] |= {"qa": [["what <b> is it?", "a zebra"]], "license": "<script>"}
    write_tar(
        mine / "train-0000.tar",
        [(f"t{n}", {"png": images[n], "json": json.dumps(records[n]).encode()}) for n in range(4)],
    )
    write_tar(
        mine / "val-0000.tar",
        [
            ("copy", {"png": images[2], "json": json.dumps(records[4]).encode()}),
            ("bad", {"png": b"not a picture", "json": json.dumps(records[5]).encode()}),
        ],
    )
    shards = [index_shard(mine / f"{split}-0000.tar") for split in ("train", "val")]
    write_manifest(
        mine, shards, cleaning={"min_side": 8, "changed": {"masked": 2}}, rejected={"no text": 5}
    )
    return scenes, mine


def test_a_report_counts_samples_texts_and_copies(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    scenes, mine = folders
    page, figures = tmp_path / "report.html", tmp_path / "report.json"
    line = ["data", "report", str(scenes), str(mine), "--out", str(page), "--json", str(figures)]
    assert main([*line, "--duplicates", "exact", "--weights", "1", "3"]) == 0
    report = json.loads(figures.read_text())
    first, other = report["folders"]
    assert first["samples"] == 430 and first["splits"]["heldout"] == 200
    assert other["splits"] == {"train": 4, "val": 2}
    assert other["texts"] == {
        "captions": 12,
        "questions": 1,
        "labels": 0,
        "documents": 0,
        "samples without any text": 0,
    }
    assert other["licenses"] == {"CC0": 5, "<script>": 1}
    assert other["words"]["zebra"] == 7 and other["rejected"] == {"no text": 5}
    assert other["shorter_side"] == {"32 to 64": 5} and other["aspect"] == {"0.95 to 1.05": 5}
    assert other["caption_words"] == {"0 to 3": 6, "3 to 6": 6}
    assert [line.split(":")[0] for line in other["unreadable"]] == ["bad"]
    # One of the 436 images is unreadable.
    copies = report["duplicates"]
    assert copies["images"] == 435 and copies["between splits or folders"] == 5
    html = page.read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html and "what &lt;b&gt; is it?" in html
    # 34 training samples with weights 1 and 3: 8.5 / 30 and 25.5 / 4 passes
    passes = html.split("passes over the folder per epoch")[1].split("</table>")[0]
    assert re.findall(r"class='number'>([\d.]+)", passes) == ["0.2833", "6.375"]
    assert html.count("<figure>") > 30 and "http" not in html


def test_a_label_that_is_null_or_empty_is_not_counted() -> None:
    folder = FolderStats(Path("folder"), {})
    for label in (b"null", b'""', b'"dog"', b"0"):
        folder.add("train", Sample("a", {"json": b'{"label": %s}' % label}))
    assert folder.kinds["labels"] == 2 and folder.kinds["samples without any text"] == 2


def test_the_same_seed_shows_the_same_samples(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pages = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / f"{name}.html"
        assert main(["data", "report", str(folders[0]), "--out", str(out), "--seed", seed]) == 0
        pages.append(out.read_text())
    assert pages[0] == pages[1] != pages[2]


def test_wrong_arguments_give_an_error(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = str(tmp_path / "report.html")
    for arguments, message in (
        ([str(folders[0]), "--weights", "1", "2", "--out", page], "2 --weights for 1 folders"),
        ([*map(str, folders), "--weights", "1", "0", "--out", page], "expected positive numbers"),
        ([str(folders[0])] * 2 + ["--out", page], "named twice"),
        ([str(tmp_path / "nowhere"), "--out", page], "no such folder"),
        ([str(folders[0]), "--out", str(tmp_path / "report.txt")], ".html"),
    ):
        assert main(["data", "report", *arguments]) == 1
        assert message in capsys.readouterr().err and not Path(page).exists()
