"""Runs of a student with a teacher: what it learns, resuming, and teachers that cannot teach."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from multimodal.api import Model, load
from multimodal.cli import main
from multimodal.scenes.dataset import write_scenes
from multimodal.tokenizers.text import TextTokenizer
from tests.launches import launch, logged, run_processes, sharded

LOSSES = ("train/teacher/caption", "train/teacher/image", "train/teacher/reconstruct")


def configuration(student: Path, teacher: Path, folder: Path, **module: Any) -> dict[str, Any]:
    arguments = {
        "teacher": str(teacher), "text_tokenizer": str(student), "image_tokenizer": str(student),
        "size": "tiny", "objectives": {"alignment_dim": 32}, "row_length": 192, "warmup_steps": 0,
        "captions_in_validation": 0, "answers_in_validation": 0, "drawings_in_validation": 0,
    }  # fmt: skip
    return {
        "checkpoint_every": 3,
        "model": {
            "class_path": "multimodal.train.distill.DistillModule",
            "init_args": arguments | module,
        },
        "data": {"folders": [str(folder / "scenes")], "global_batch_size": 8, "workers": 0},
        "trainer": {"max_steps": 6, "accelerator": "cpu", "enable_progress_bar": False,
                    "limit_val_batches": 1, "log_every_n_steps": 1},
    }  # fmt: skip


@pytest.fixture(scope="module")
def taught(
    tiny_model: Callable[..., Model], tiny_model_folder: Path, tmp_path_factory: Any
) -> Path:
    """run.yaml, scenes/, a teacher/ of another width, and a run: whole/. Tests only read it."""
    folder, threads = tmp_path_factory.mktemp("distill"), torch.get_num_threads()
    torch.set_num_threads(1)
    write_scenes(folder / "scenes", 24, 0, 32)
    small = tiny_model()
    torch.manual_seed(1)
    teacher = Model.new(
        "mini", small.text_tokenizer, small.image_tokenizer, small.config.objectives
    )
    with torch.no_grad():
        teacher.network.transformer.embed_tokens.weight.mul_(4)  # it is sure of what it says
    teacher.save(folder / "teacher")
    config = configuration(
        tiny_model_folder, folder / "teacher", folder, teacher_weight=1.0, learning_rate=0.01
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(fit(folder, folder / "whole")) == 0
    torch.set_num_threads(threads)
    return folder


def fit(folder: Path, output: Path, *more: str) -> list[str]:
    return ["fit", "--config", str(folder / "run.yaml"), "--output", str(output), *more]


def test_the_student_comes_nearer_to_its_teacher_in_texts_and_images(taught: Path) -> None:
    for name in LOSSES:
        values = [float(value) for _, value in sorted(logged(taught / "whole", name).items())]
        assert len(values) == 6 and values[-1] < 0.9 * values[0], (name, values)
    assert not logged(taught / "whole", "val/teacher/caption")
    assert logged(taught / "whole", "val/caption")


def test_it_resumes_to_the_bit_and_keeps_no_teacher(
    taught: Path, tmp_path: Path, one_thread: None
) -> None:
    checkpoints = taught / "whole/checkpoints"
    stored = torch.load(checkpoints / "last.ckpt", weights_only=True)
    assert not [name for name in stored["state_dict"] if "teacher" in name]
    half = next(path for path in checkpoints.iterdir() if "step=3." in path.name)
    assert main(fit(taught, tmp_path / "again", "--ckpt_path", str(half))) == 0
    one, other = (
        (run / "model/model.safetensors").read_bytes()
        for run in (taught / "whole", tmp_path / "again")
    )
    assert one == other


def test_another_teacher_is_refused_when_a_run_is_resumed(
    taught: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = taught / "whole/checkpoints/last.ckpt"
    more = ["--ckpt_path", str(last), "--model.teacher", str(tiny_model_folder)]
    more += ["--trainer.max_steps", "7"]
    assert main(fit(taught, tmp_path / "again", *more)) != 0
    assert "had another teacher" in capsys.readouterr().err


def test_another_teacher_of_parts_of_weights_is_refused(
    taught: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """With FSDP2 Lightning reads a checkpoint after ``on_fit_start``."""
    run = tmp_path / "run"
    launch(fit(taught, run, "--trainer.max_steps", "1", *sharded()))
    other = ["--ckpt_path", "last", "--model.teacher", str(tiny_model_folder)]
    (end,) = run_processes(fit(taught, run, *other, *sharded()))
    assert end.status == 1 and "had another teacher" in end.stderr, end


@pytest.mark.parametrize("kind", ["text", "codes", "missing", "numbers", "rows"])
def test_what_cannot_teach_is_refused_before_a_step(
    taught: Path, tiny_model: Callable[..., Model], tmp_path: Path, kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "other"
    if kind == "text":
        model = tiny_model()
        text = TextTokenizer.train(["other words entirely, of other letters"] * 9, 300)
        Model.new("tiny", text, model.image_tokenizer, model.config.objectives).save(other)
        reason = "the teacher's text tokenizer is not that of this run"
    elif kind == "codes":
        tiny_model(seed=5).save(other)
        reason = "the teacher's image tokenizer is not that of this run"
    elif kind == "missing":
        reason = "other: no such model folder"
    else:
        shutil.copytree(taught / "teacher", other)
        reason = "teacher_weight=1.5: expected" if kind == "numbers" else "the teacher reads"
    more = {"numbers": ["--model.teacher_weight=1.5"], "rows": ["--model.row_length=70000"]}
    arguments = fit(taught, tmp_path / "run", "--model.teacher", str(other), *more.get(kind, []))
    assert main(arguments) != 0
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_adapter_learns_from_a_teacher(
    taught: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    more = ["--model.lora.r", "4", "--init_from", str(tiny_model_folder)]
    assert main(fit(taught, tmp_path / "run", *more, "--model.learning_rate", "0.05")) == 0
    losses = list(map(float, logged(tmp_path / "run", "train/teacher/caption").values()))
    assert losses[-1] < losses[0]
    kinds = load(tiny_model_folder, adapter=tmp_path / "run/adapter").provenance.sources
    assert sum(source["kind"] == "model" for source in kinds) >= 2, "the base and the teacher"
