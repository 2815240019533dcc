"""A long bf16 run at three times the learning rate, with and without QK-norm and z-loss.

    python benchmarks/stability.py --data data/scenes --text-tokenizer runs/scenes-text.json \
        --image-tokenizer runs/scenes-tokenizer/model [--steps 3000] [--rate 1.2e-2]
        [--picture docs/training/stability.png] [--out runs/stability]

Four runs of a `tiny` with the same seed and batches. Prints for each the largest loss after the
warm-up, the number of spikes (a loss above twice its running median), the largest logit, and the
last log Z. The picture has the curves. Runs that are done are kept in ``--out``. The last line is
JSON.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from multimodal.train.data import ShardData
from multimodal.train.examples import Examples
from multimodal.train.joint import JointModule

SETTINGS = {
    "as it is": (True, 1e-4),
    "without z-loss": (True, 0.0),
    "without QK-norm": (False, 1e-4),
    "without both": (False, 0.0),
}
KEPT = ("total", "largest_logit", "log_z")
WARM_UP = 100  # steps


class NoNorm(nn.Module):
    """Stands for a norm of queries or keys, and changes nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)


class Record(L.Callback):
    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {name: [] for name in KEPT}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Examples, n: int
    ) -> None:
        for name in KEPT:
            self.curves[name].append(float(trainer.callback_metrics[f"train/{name}"]))


def train(arguments: argparse.Namespace, qk_norm: bool, z_loss: float) -> dict[str, list[float]]:
    import multimodal.model.layers.transformer as transformer

    original = transformer.norm_in_fp32

    def plain(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x.float() if isinstance(norm, NoNorm) else original(norm, x)  # type: ignore[arg-type]

    L.seed_everything(0, verbose=False)
    module = JointModule(
        arguments.text_tokenizer,
        arguments.image_tokenizer,
        "tiny",
        row_length=192,
        learning_rate=arguments.rate,
        answers_in_validation=0,
        drawings_in_validation=0,
    )
    object.__setattr__(module.model.config.objectives, "z_loss_weight", z_loss)
    if not qk_norm:
        for layer in module.model.network.transformer.layers:
            size = layer.self_attn.head_dim
            layer.self_attn.q_norm, layer.self_attn.k_norm = NoNorm(size), NoNorm(size)
    transformer.norm_in_fp32 = plain  # type: ignore[assignment]
    record = Record()
    trainer = L.Trainer(
        max_steps=arguments.steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[record],
        enable_checkpointing=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        enable_model_summary=False,
    )
    data = ShardData([arguments.data], global_batch_size=32, workers=1)
    try:
        trainer.fit(module, data)
    finally:
        transformer.norm_in_fp32 = original
    return record.curves


def summary(curves: dict[str, list[float]]) -> dict[str, float | None]:
    """Figures of a run. ``diverged`` is the first step whose loss is not finite, or None."""
    total = curves["total"]
    diverged = next((n for n, value in enumerate(total) if not math.isfinite(value)), None)
    good = total[:diverged]
    spikes = sum(
        value > 2 * statistics.median(good[n - 50 : n])
        for n, value in enumerate(good)
        if n > WARM_UP
    )
    logits, z = (curves[name][: len(good)] for name in ("largest_logit", "log_z"))
    return {
        "diverged": diverged,
        "spikes": spikes,
        "last": statistics.mean(good[-50:]),
        "largest_after_warm_up": max(good[WARM_UP:], default=math.nan) if not diverged else None,
        "largest_logit": max(logits),
        "log_z": statistics.mean(z[-50:]),
    }


def draw(runs: dict[str, dict[str, list[float]]], picture: Path) -> None:
    """Draw the losses of all runs, one below the other."""
    from PIL import Image, ImageDraw

    width, height = 900, 170
    image = Image.new("RGB", (width, height * len(runs)), "white")
    pen = ImageDraw.Draw(image)
    values = [v for curves in runs.values() for v in curves["total"][20:] if math.isfinite(v)]
    top = max(values)
    for number, (name, curves) in enumerate(runs.items()):
        total = curves["total"]
        points = [
            (
                10 + (width - 20) * n / len(total),
                height * (number + 1) - 10 - (height - 35) * min(value, top) / top,
            )
            for n, value in enumerate(total)
            if math.isfinite(value)
        ]
        pen.text((12, height * number + 6), f"{name}: loss, 0 to {top:.1f}", fill="black")
        pen.line(points, fill=(30, 90, 170))
        pen.line((10, height * (number + 1) - 10, width - 10, height * (number + 1) - 10), "gray")
    picture.parent.mkdir(parents=True, exist_ok=True)
    image.save(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--text-tokenizer", required=True)
    parser.add_argument("--image-tokenizer", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=1.2e-2, help="three times the tuned 4e-3")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--picture", type=Path, default=Path("docs/training/stability.png"))
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP + 50:
        parser.error(f"--steps {arguments.steps}: expected more than {WARM_UP + 50}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "picture"}
    runs = {}
    for name, (qk_norm, z_loss) in SETTINGS.items():
        file = arguments.out / f"{name.replace(' ', '-')}-{arguments.steps}.json"
        if not file.is_file():
            curves = train(arguments, qk_norm, z_loss)
            file.write_text(json.dumps({"settings": settings, "curves": curves}), "utf-8")
        stored = json.loads(file.read_text("utf-8"))
        if stored["settings"] != settings:
            parser.error(f"{file}: is of other settings; give another --out")
        runs[name] = stored["curves"]
        print(name, summary(runs[name]), flush=True)
    draw(runs, arguments.picture)
    figures = {name: summary(curves) for name, curves in runs.items()}
    print(json.dumps({"steps": arguments.steps, "rate": arguments.rate, "runs": figures}))


if __name__ == "__main__":
    main()
