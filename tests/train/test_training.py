"""Training by the command line on tiny scenes: starting weights, recipes, errors."""

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from multimodal.api import load
from multimodal.cli import main
from multimodal.model.objectives import ObjectivesConfig
from multimodal.options import DrawArguments, DrawOptions
from multimodal.tokenizers.image import load_image_tokenizer
from multimodal.train.data import ShardData
from multimodal.train.examples import Examples, ShardDataset
from multimodal.train.joint import JointModule
from multimodal.train.run.recipes import recipe_names
from multimodal.train.sample_order import GlobalBatches, Order
from multimodal.train.tokenizers import detail
from tests.launches import logged

RECIPES = Path(__file__).parent.parent.parent / "train" / "recipes"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["tokenizer", "joint"])
def test_init_from_starts_from_the_weights_at_step_0(work: Path, tmp_path: Path, name: str) -> None:
    config, model = str(work / f"{name}.yaml"), str(work / name / "model")
    fit = ["fit", "--config", config, "--trainer.max_steps", "1", "--data.val_limit", "8"]
    for run, more in (("a", ["--init_from", model]), ("b", ["--init_from", model]), ("c", [])):
        # Rate 0 keeps the weights, so the seed changes the initial weights only.
        rate = ["--model.init_args.learning_rate", "0", "--data.seed", "0"]
        rate += ["--seed_everything", str(ord(run))]
        assert main([*fit, *rate, *more, "--output", str(tmp_path / run)]) == 0
    loss_name = "train/l1" if name == "tokenizer" else "train/total"
    first, again, random = (logged(tmp_path / run, loss_name) for run in "abc")
    assert list(first) == [0] and first == again and first[0] != random[0]
    expected = load_file(work / name / "model/model.safetensors")
    weights = load_file(tmp_path / "a" / "model/model.safetensors")
    learned = [key for key in expected if "running" not in key and "num_batches" not in key]
    assert all(torch.equal(weights[key], expected[key]) for key in learned)
    if name == "joint":
        # The loss at step 0 is the loss of the loaded model on that batch.
        assert float(first[0]) == pytest.approx(loss_of_model(work, Path(model)), rel=1e-5)


def test_decoder_only_keeps_the_codes_and_a_model_takes_the_decoder(
    work: Path, tmp_path: Path
) -> None:
    start = str(work / "tokenizer" / "model")
    fit = ["fit", "--config", str(work / "tokenizer.yaml"), "--trainer.max_steps", "6"]
    fit += ["--model.init_args.decoder_only", "true", "--model.init_args.mse_weight", "0"]
    sharper, model = str(tmp_path / "model"), str(work / "joint" / "model")
    assert main([*fit, "--init_from", start, "--output", str(tmp_path)]) == 0
    before, after = (load_image_tokenizer(f) for f in (start, sharper))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    codes = before.encode(images)
    assert torch.equal(codes, after.encode(images))
    old, new = before.state_dict(), after.state_dict()
    changed = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder"}
    assert after.codes_fingerprint == before.codes_fingerprint
    # Joint training accepts the new decoder, with a model that had the old one.
    fit = ["fit", "--config", str(work / "joint.yaml"), "--trainer.max_steps", "1"]
    fit += ["--data.val_limit", "8", "--model.init_args.image_tokenizer", sharper]
    assert main([*fit, "--init_from", model, "--output", str(tmp_path / "joint")]) == 0
    assert load(tmp_path / "joint/model").image_tokenizer.fingerprint == after.fingerprint


@pytest.mark.parametrize("collapsed", [False, True])
def test_a_collapsed_codebook_gives_a_warning(
    work: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
    collapsed: bool,
) -> None:
    monkeypatch.setattr(detail, "USAGE_EVERY", 12)
    quantizer = {"name": "vq", "codebook_size": 64, "channels": 4, "decay": 0.5}
    if collapsed:  # all codes start equal, never move, and are never restarted
        monkeypatch.setattr(
            "multimodal.tokenizers.quantizers.quantizer.sample_codebook",
            lambda flat, count: (flat[:1].expand(count, -1), torch.tensor(True)),
        )
        quantizer |= {"decay": 1.0, "dead_after": 0.0}
    config = yaml.safe_load((work / "tokenizer.yaml").read_text())
    config["model"]["init_args"]["tokenizer"]["quantizer"] = quantizer
    config |= {"output": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0
    collapses = [str(w.message) for w in recwarn if "the codebook collapses" in str(w.message)]
    assert bool(collapses) == collapsed
    assert not collapsed or "step 11: " in collapses[0]
    dead = logged(tmp_path / "run", "train/codebook_dead")
    assert list(dead) == [11] and (float(dead[11]) == 63) == collapsed


def test_tokenizers_can_be_taken_from_a_model(work: Path, tmp_path: Path) -> None:
    model = str(work / "joint" / "model")
    fit = ["fit", "--config", str(work / "joint.yaml"), "--trainer.max_steps", "1"]
    fit += ["--data.val_limit", "8", "--init_from", model, "--output", str(tmp_path)]
    for kind in ("text", "image"):
        fit += [f"--model.init_args.{kind}_tokenizer", model]
    assert main(fit) == 0
    before, after = load(model), load(tmp_path / "model")
    assert after.image_tokenizer.fingerprint == before.image_tokenizer.fingerprint
    assert after.text_tokenizer.to_json() == before.text_tokenizer.to_json()


def a_batch(work: Path, **arguments: Any) -> tuple[JointModule, Examples]:
    config = yaml.safe_load((work / "joint.yaml").read_text())
    module = JointModule(**config["model"]["init_args"] | arguments)
    shards = ShardData(config["data"]["folders"]).shards("train")
    dataset = ShardDataset(shards, 16, "squash", seed=0)
    items = next(iter(GlobalBatches(Order([[len(dataset)]]), 8)))
    return module, dataset.collate([dataset[item] for item in items])


def test_images_have_the_codes_of_float32_whatever_the_precision_of_the_run(work: Path) -> None:
    module, batch = a_batch(work)
    expected = module.codes(batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.codes(batch)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def loss_of_model(work: Path, folder: Path) -> float:
    module, batch = a_batch(work)
    module.model = load(folder)
    with torch.no_grad():
        loss, _ = module.model.network(module.pack(batch))
    return float(loss)


def test_sequences_without_a_loss_are_not_computed(work: Path) -> None:
    """A run that only draws has the same loss from about half of the tokens."""
    goals = ObjectivesConfig(
        weights={"caption": 0, "answer": 0, "text": 0},
        alignment_weight=0,
        next_token_share=1.0,
        reconstruct_share=0.0,
    )
    module, batch = a_batch(work, objectives=goals)
    losses, tokens = [], []
    for training in (False, True):
        loss, parts = module.train(training).network(module.pack(batch))
        losses.append(float(loss))
        tokens.append(module.tokens)
        assert ("caption" in parts) != training and "image" in parts
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tokens[1] < 0.6 * tokens[0]


# --- measuring and predicting ---------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_measuring_uses_the_last_checkpoint_and_keeps_the_training_log(
    work: Path, verb: str
) -> None:
    run, before = work / "joint", logged(work / "joint")
    assert main([verb, "--config", str(work / "joint.yaml")]) == 0
    assert logged(run) == before
    with open(run / verb / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    with open(run / "logs" / "metrics.csv", newline="") as file:
        at_the_end = [r["val/total"] for r in csv.DictReader(file) if r["val/total"]][-1]
    assert float(row["val/total"]) == pytest.approx(float(at_the_end), rel=1e-4)


def test_validation_draws_as_the_model_does(work: Path, tmp_path: Path) -> None:
    model = str(work / "joint" / "model")
    run = ["--config", str(work / "joint.yaml"), "--init_from", model, "--output", str(tmp_path)]
    assert main(["validate", *run]) == 0
    (picture,) = tmp_path.rglob("step-*.png")
    (prompt,) = (picture.parent / "prompts.txt").read_text("utf-8").splitlines()
    shown = np.asarray(Image.open(picture))
    for options, same in (
        (DrawArguments(), True),
        (DrawArguments(method=DrawOptions().method), True),
        (DrawArguments(method="masked"), False),
    ):
        (drawn,) = load(model).draw(prompt, **options)
        assert np.array_equal(shown, np.asarray(drawn)) == same, options


def test_predict_writes_captions_in_the_order_of_the_data(work: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(work / "joint.yaml"), "--output", str(tmp_path / "new")]
    model = ["--init_from", str(work / "joint/model"), "--data.val_limit", "12"]
    assert main(["predict", *arguments, *model]) == 0
    lines = (tmp_path / "new/predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["key"] for r in records] == [f"scene-val-0-{i:07d}" for i in range(12)]
    from multimodal.data.shards import Shards

    images = [sample.image for sample in itertools.islice(Shards(work / "scenes", "val"), 12)]
    expected = load(work / "joint/model").caption(images, batch_size=8)
    assert [r["caption"] for r in records] == expected


def test_predict_of_an_image_tokenizer_writes_codes(work: Path) -> None:
    assert main(["predict", "--config", str(work / "tokenizer.yaml")]) == 0
    lines = (work / "tokenizer/predictions.jsonl").read_text().splitlines()
    codes = torch.tensor([json.loads(line)["codes"] for line in lines])
    assert codes.shape == (8, 2, 2) and 0 <= int(codes.min()) <= int(codes.max()) < 25


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", name, "--print_config"])
    assert stopped.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"].startswith("multimodal.train.")
    top = (RECIPES / name).read_text().split("\n\n")[0]
    assert f"multimodal fit --config {name}" in top, "the comment has the command"


def test_recipes_for_scenes_run(work: Path, tmp_path: Path) -> None:
    """Both recipes in the order of the README. Options make them small."""
    options = [
        "--trainer.max_steps",
        "2",
        "--trainer.val_check_interval",
        "2",
        "--data.workers",
        "0",
    ]
    options += ["--data.folders", f"[{work / 'scenes'}]", "--data.global_batch_size", "4"]
    options += ["--data.val_limit", "4", "--trainer.enable_progress_bar", "false"]
    options += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    options += ["--model.init_args.text_tokenizer", str(work / "text.json")]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    small = ["--model.init_args.tokenizer.autoencoder.dim", "32"]
    assert (
        main(["fit", "--config", "scenes_tokenizer.yaml", *options, *small, "--output", first]) == 0
    )
    small = ["--model.init_args.image_tokenizer", f"{first}/model"]
    small += ["--model.init_args.size", "tiny"]
    small += ["--model.init_args.drawings_in_validation", "1"]
    small += [
        "--model.init_args.row_length",
        "256",
    ]  # the small text tokenizer gives long sequences
    assert main(["fit", "--config", "scenes_joint.yaml", *options, *small, "--output", second]) == 0
    assert len(load(f"{second}/model").caption([picture()])) == 1


def picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (40, 30), (200, 30, 30))


# --- mistakes of users ----------------------------------------------------------------------------

OBJECTIVES = "--model.init_args.objectives"
ZERO = "{caption: 0, answer: 0, text: 0, image: 0, reconstruct: 0}"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--data.folders", "[nowhere]"], 1, r"nowhere: no such folder"),
        (["--data.folders", "[BARE]"], 1, r"no manifest.json; .* multimodal data index"),
        (["--data.train_split", "trian"], 1, r"no split 'trian'; it has heldout, train, val"),
        (["--data.global_batch_size", "999"], 1, r"50 samples are fewer than one global batch"),
        (["--model.init_args.text_tokenizer", "no.json"], 1, r"error: no.json: no such file; "),
        (["--model.init_args.image_tokenizer", "no"], 1, r"error: no: not an image tokenizer"),
        (["--model.init_args.row_length", "7"], 1, r"an image of 4 codes needs 8"),
        (["--model.init_args.row_length", "9999"], 1, r"the model reads at most 4096 tokens"),
        (["--model.init_args.row_length", "30"], 1, r"\d+ of the first 50 samples cannot be used"),
        (
            [f"{OBJECTIVES}.weights", ZERO, f"{OBJECTIVES}.alignment_weight", "0"],
            1,
            r"the weights of all objectives are zero",
        ),
        ([f"{OBJECTIVES}.weights.caption", "-1"], 1, r"expected 0 or more"),
        (
            [f"{OBJECTIVES}.weights.answer", "1", "--model.init_args.question_share", "0"],
            1,
            r"has answer: 1.0, but none of the",
        ),
        (
            [f"{OBJECTIVES}.weights.reconstruct", "1", f"{OBJECTIVES}.reconstruct_share", "0"],
            1,
            r"has reconstruct: 1.0, but none",
        ),
        (["--model.init_args.size", "huge"], 1, r"size 'huge': expected one of tiny, "),
        (["--model.init_args.sise", "tiny"], 2, r"Option 'sise' is not accepted"),
        (["--model.class_path", "multimodal.train.joint.Nope"], 2, r"has no attribute 'Nope'"),
        (["--trainer.max_steps", "many"], 2, r"trainer.max_steps.*Got value: many"),
        (["--trainer.max_steps", "-1"], 1, r"the run has no end"),
        (["--speed", "3"], 2, r"unrecognized arguments: --speed 3"),
        (["--config", "no.yaml"], 1, r"no.yaml: no such file, and no recipe .*scenes_joint, "),
        (["--config", "WRONG"], 2, r"does not accept option 'trainr"),
        (["--ckpt_path", "no.ckpt"], 1, r"no.ckpt: no such checkpoint"),
        (["--ckpt_path", "OTHER"], 1, r"the checkpoint is of another model"),
        (["--init_from", "nowhere"], 1, r"nowhere: no such model folder"),
        (
            ["--init_from", "MODEL", "--model.init_args.size", "mini"],
            1,
            r"of this run: hidden_size ",
        ),
        (["--init_from", "MODEL", "--ckpt_path", "x"], 1, r"give one of them"),
    ],
)
def test_a_mistake_of_the_user_gives_one_line(
    work: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    message: str,
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(work / "scenes/val-0000.tar", bare)
    (tmp_path / "wrong.yaml").write_text("trainr: {max_steps: 3}\n")
    names = {
        "BARE": str(bare),
        "MODEL": str(work / "joint/model"),
        "OTHER": str(work / "tokenizer/checkpoints/last.ckpt"),
        "WRONG": str(tmp_path / "wrong.yaml"),
    }
    options = [re.sub("|".join(names), lambda m: names[m[0]], option) for option in options]
    fit = ["fit", "--config", str(work / "joint.yaml"), "--output", str(tmp_path / "run")]
    assert main([*fit, "--trainer.max_steps", "1", *options]) == status
    out, err = capfd.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("multimodal fit: error: ") and re.search(message, last), err
    assert len(last) < 500 and "Traceback" not in err and out == ""


def test_measuring_without_weights_is_refused(
    work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ["--config", str(work / "joint.yaml"), "--output", str(tmp_path)]
    assert main(["validate", *run]) == 1
    assert "no weights to use" in capfd.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    assert "examples:" in capsys.readouterr().err
    assert main(["fit", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipe_names()) and "--ckpt_path" in out


def test_a_forecast_prints_what_a_run_needs_and_keeps_nothing(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted((work / "joint").rglob("*"))
    assert main(["info", "--config", str(work / "joint.yaml"), "--trainer.max_steps", "900"]) == 0
    out = capsys.readouterr().out
    assert "131,458 to train, " in out and "900 steps in " in out and " GB at most" in out
    once = ["--trainer.max_steps", "1", "--trainer.accumulate_grad_batches", "2"]
    once += ["--trainer.val_check_interval", "2"]
    assert main(["info", f"--config={work / 'joint.yaml'}", *once]) == 0
    assert "1 steps in " in capsys.readouterr().out
    assert sorted((work / "joint").rglob("*")) == before and not list(tmp_path.iterdir())
    assert main(["info", "--config", str(work / "joint.yaml"), "--model.nope", "1"]) == 2


def test_a_run_prints_nothing_useless(work: Path, tmp_path: Path) -> None:
    recipe = ["--config", str(work / "joint.yaml"), "--trainer.max_steps", "1"]
    run = ["fit", *recipe, "--output", str(tmp_path / "run"), "--data.workers", "1"]
    useful = ("Seed set to", "GPU available", "parameters to train", "`Trainer.fit` stopped")
    useful += ("step 1 of 1", "validation at step 1 (the best", "run/model: step 1, the best of 1 ")
    useful += ("energy of this start",)
    # A forecast is no training that stops.
    for command, expected in ((run, useful), (["info", *recipe], useful[:3])):
        words = [sys.executable, "-m", "multimodal.cli", *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout == "") == (0, command == run), done.stderr
        lines = done.stderr.splitlines()
        assert [line for line in lines if not any(u in line for u in expected)] == []
