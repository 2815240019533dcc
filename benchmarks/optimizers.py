"""Muon as it is used here, and AdamW: the joint losses after the same steps.

    python benchmarks/optimizers.py --data data/scenes --text-tokenizer runs/scenes-text.json \
        --image-tokenizer runs/scenes-tokenizer/model [--size mini] [--steps 300] [--rates 2e-3]

Both start from the same weights and see the same batches, with the same warm-up and cosine. Prints
the mean losses over the last tenth of the steps, for each learning rate, and the ratio of the
seconds of a step.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import lightning as L
import torch

from multimodal.train.data import ShardData
from multimodal.train.examples import Examples
from multimodal.train.joint import JointModule
from multimodal.train.optim import warmup_cosine

PARTS = ("caption", "answer", "image", "reconstruct", "alignment")


class WithAdamW(JointModule):
    """The same module with AdamW. Only matrices decay."""

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95), fused=True)
        return warmup_cosine(adamw, self.warmup_steps, self.trainer)


class Record(L.Callback):
    """The losses and the seconds of each step."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Examples, batch_idx: int
    ) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Examples,
        batch_idx: int,
    ) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        logged = trainer.logged_metrics
        self.losses.append(
            {part: float(logged[f"train/{part}"]) for part in PARTS if f"train/{part}" in logged}
        )


def run(kind: type[JointModule], options: argparse.Namespace, rate: float) -> Record:
    L.seed_everything(0, verbose=False)
    module = kind(
        text_tokenizer=options.text_tokenizer,
        image_tokenizer=options.image_tokenizer,
        size=options.size,
        row_length=192,
        learning_rate=rate,
        warmup_steps=min(100, options.steps // 3),
    )
    record = Record()
    trainer = L.Trainer(
        max_steps=options.steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[record],
    )
    trainer.fit(module, ShardData(folders=[options.data], global_batch_size=64, workers=0))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--text-tokenizer", required=True)
    parser.add_argument("--image-tokenizer", required=True)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3])
    options = parser.parse_args()
    last = max(1, options.steps // 10)
    seconds = {}
    for kind, rate in itertools.product((JointModule, WithAdamW), options.rates):
        record = run(kind, options, rate)
        name = "AdamW" if kind is WithAdamW else "Muon"
        seconds[name] = statistics.median(record.seconds[6:])
        means = {
            part: statistics.fmean(losses[part] for losses in record.losses[-last:])
            for part in record.losses[-1]
        }
        print(f"{name} {rate:g}\t" + "\t".join(f"{k} {v:.3f}" for k, v in means.items()))
    print(f"a step with Muon takes {seconds['Muon'] / seconds['AdamW']:.2f} of one with AdamW")


if __name__ == "__main__":
    main()
