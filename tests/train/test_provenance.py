"""Licences and sources follow weights: through fine-tuning, resuming, joining and export."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.export.gguf import export_gguf
from multimodal.export.hf import export_hf
from multimodal.export.model import export_model
from multimodal.provenance import Provenance
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.tokenizers.text import ChatFormat

TERMS = "Only on Sundays.\n\nThe long text."
PHOTOS = {"kind": "data", "name": "photos", "samples": 1000, "license": "Sundays"}


def test_licences_and_sources_add_up_without_repeats(tmp_path: Path) -> None:
    one = Provenance((TERMS,), (PHOTOS,))
    both = one + Provenance(("Another.",), ({"kind": "data", "name": "drawings"},)) + one
    assert both.licenses == (TERMS, "Another.") and len(both.sources) == 2
    both.write(tmp_path)
    assert Provenance.read(tmp_path) == both
    assert both.lines() == [
        "data photos (samples 1,000; license: Sundays)",
        "data drawings (license: none is given)",
    ]
    (tmp_path / "sources.json").write_text('{"sources": 3}')
    with pytest.raises(ValueError, match=r"sources.json: expected an object"):
        Provenance.read(tmp_path)
    assert Provenance.read(tmp_path / "nothing") == Provenance()


def test_exports_carry_the_licence(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model_folder, source)
    Provenance((TERMS,), (PHOTOS,)).write(source)
    export_model(source, tmp_path / "half")
    export_hf(source, tmp_path / "stock")
    load(source).image_tokenizer.save(tmp_path / "tokenizer")
    export_gguf(source, tmp_path / "weights.gguf")
    stored = gguf.GGUFReader(tmp_path / "weights.gguf").fields
    assert stored["general.license.name"].contents() == "Only on Sundays."
    for name in ("LICENSE", "sources.json"):
        assert stored[f"multimodal.{name}"].contents() == (source / name).read_text("utf-8")
    for folder in ("half", "stock", "half/image_tokenizer", "tokenizer"):
        assert Provenance.read(tmp_path / folder) == Provenance((TERMS,), (PHOTOS,)), folder
    assert "data photos" in (tmp_path / "stock" / "README.md").read_text("utf-8")
    for folder in ("half", "tokenizer"):
        capsys.readouterr()
        assert main(["info", str(tmp_path / folder)]) == 0
        shown = capsys.readouterr().out
        assert "license: Only on Sundays.\n" in shown and "data photos (samples 1,000" in shown


def test_a_model_takes_nothing_of_one_that_it_replaces(
    tmp_path: Path, tiny_model: Callable[..., Model], tiny_model_folder: Path
) -> None:
    old, folder = load(tiny_model_folder), tmp_path / "model"
    old.text_tokenizer.chat = ChatFormat("{{ messages }}", "a")
    old.provenance = old.image_tokenizer.provenance = Provenance((TERMS,), (PHOTOS,))
    old.save(folder)
    assert load(folder).text_tokenizer.chat is not None
    for name in ("chat_template.jinja", "notes.txt"):
        (folder / name).write_text("{{ messages }}")
    tiny_model(seed=1).save(folder)
    new = load(folder)
    assert new.provenance == new.image_tokenizer.provenance == Provenance()
    assert new.text_tokenizer.chat is None and not (folder / "chat_template.jinja").exists()
    assert (folder / "notes.txt").exists()


def test_the_files_of_a_folder_without_a_model_stay(
    tmp_path: Path, tiny_model: Callable[..., Model]
) -> None:
    (tmp_path / "LICENSE").write_text("MIT")
    tiny_model().save(tmp_path)
    assert (tmp_path / "LICENSE").read_text() == "MIT"


def test_a_fine_tuned_model_has_the_licence_of_its_start_and_a_card(
    work: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(work / "joint" / "model", start)
    Provenance((TERMS,), (PHOTOS,)).write(start)
    fit = ["fit", "--config", str(work / "joint.yaml"), "--data.val_limit", "8"]
    first = [*fit, "--init_from", str(start), "--output", str(tmp_path / "a")]
    assert main([*first, "--trainer.max_steps", "1"]) == 0
    checkpoint = str(tmp_path / "a" / "checkpoints" / "last.ckpt")
    resumed = [*fit, "--ckpt_path", checkpoint, "--output", str(tmp_path / "b")]
    assert main([*resumed, "--trainer.max_steps", "2"]) == 0
    assert "| val/" in (start / "README.md").read_text("utf-8"), "numbers of a validation"
    for run, steps in (("a", "1 steps"), ("b", "2 steps")):
        model = tmp_path / run / "model"
        found = Provenance.read(model)
        assert TERMS in found.licenses and PHOTOS in found.sources
        (before,) = (s for s in found.sources if s["name"] == str(start))
        assert before["kind"] == "model" and before["fingerprint"] == load(start).fingerprint
        card = (model / "README.md").read_text("utf-8")
        assert steps in card and "data photos" in card
        assert len({str(source) for source in found.sources}) == len(found.sources)


def test_a_model_has_the_licence_of_its_image_tokenizer(work: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(work / "tokenizer" / "model", tokenizer)
    card = (tokenizer / "README.md").read_text("utf-8")
    assert "# An image tokenizer" in card and "samples" in card
    Provenance((TERMS,), (PHOTOS,)).write(tokenizer)
    assert load_image_tokenizer(tokenizer).provenance == Provenance((TERMS,), (PHOTOS,))
    fit = ["fit", "--config", str(work / "joint.yaml"), "--data.val_limit", "8"]
    fit += ["--trainer.max_steps", "1", "--output", str(tmp_path / "run")]
    assert main([*fit, "--model.init_args.image_tokenizer", str(tokenizer)]) == 0
    assert TERMS in Provenance.read(tmp_path / "run" / "model").licenses
