"""What codes are good for: quantizers, codebook sizes and token counts at one budget.

    python benchmarks/quantizers.py --data data/scenes --text-tokenizer runs/scenes-text.json \
        [--out runs/quantizers] [--tokenizer-steps 600] [--joint-steps 300] [--only NAME ...]

For every row a tokenizer is trained for the same steps, and on its codes a small joint model for
the same steps: pictures kept (``multimodal tokenizer compare``), claims of captions that are true,
and the nats a code costs the transformer. A row that is done is not done again, so a run that was
stopped goes on. Leaves ``table.md``, ``table.json`` and ``table.png`` in the folder.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

VIT = {"name": "vit", "dim": 128, "encoder_depth": 0, "decoder_depth": 2, "heads": 4}
ATTENDING = {**VIT, "encoder_depth": 1}
FSQ = {"name": "fsq", "levels": [3] * 7}
ROWS: dict[str, dict[str, Any]] = {
    "fsq 2187": {"quantizer": FSQ},
    "fsq 2187, no words": {"quantizer": FSQ, "semantic_weight": 0.0},
    "fsq 2187, words 1": {"quantizer": FSQ, "semantic_weight": 1.0},
    "fsq 2187, attention": {"quantizer": FSQ, "autoencoder": ATTENDING},
    "fsq 243": {"quantizer": {"name": "fsq", "levels": [3] * 5}},
    "fsq 6561": {"quantizer": {"name": "fsq", "levels": [3] * 8}},
    "fsq 2187, 16 codes": {"quantizer": FSQ, "downsample": 16},
    "fsq 2187, 256 codes": {"quantizer": FSQ, "downsample": 4},
    "vq 2048": {"quantizer": {"name": "vq", "codebook_size": 2048, "channels": 8}},
    "vq 2048, gradient": {
        "quantizer": {"name": "vq", "codebook_size": 2048, "channels": 8, "learning": "gradient"}
    },
    "lfq 2048": {"quantizer": {"name": "lfq", "channels": 11}},
    "ibq 2048": {"quantizer": {"name": "ibq", "codebook_size": 2048, "channels": 16}},
}
TRAINER = {
    "precision": "bf16-mixed", "gradient_clip_val": 1.0, "check_val_every_n_epoch": None,
    "log_every_n_steps": 20, "enable_progress_bar": False,
}  # fmt: skip


def fit(folder: Path, module: str, arguments: dict[str, Any], data: str, steps: int) -> None:
    """One run of ``multimodal fit``, or the rest of one that was stopped."""
    if (folder / "done").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "output": str(folder),
        "model": {"class_path": f"multimodal.train.{module}", "init_args": arguments},
        "data": {"folders": [data], "workers": 1},
        "trainer": {**TRAINER, "max_steps": steps, "val_check_interval": steps},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "multimodal.cli", "fit", "--config", folder / "config.yaml"]
    if (last := folder / "checkpoints/last.ckpt").is_file():
        command += ["--ckpt_path", last]
    subprocess.run([str(part) for part in command], check=True)
    (folder / "done").touch()


def last_figures(folder: Path) -> dict[str, float]:
    """The newest value of everything the log has."""
    figures: dict[str, float] = {}
    with open(folder / "logs/metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            figures |= {name: float(value) for name, value in row.items() if name and value}
    return figures


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--data", required=True)
    made.add_argument("--text-tokenizer", required=True)
    made.add_argument("--out", type=Path, default=Path("runs/quantizers"))
    made.add_argument("--tokenizer-steps", type=int, default=600)
    made.add_argument("--joint-steps", type=int, default=300)
    made.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    arguments = made.parse_args()
    for name in arguments.only:
        row, folder = ROWS[name], arguments.out / name.replace(" ", "-").replace(",", "")
        config = {
            "image_size": 64, "downsample": row.get("downsample", 8),
            "autoencoder": row.get("autoencoder", VIT), "quantizer": row["quantizer"],
        }  # fmt: skip
        tokenizer = {
            "tokenizer": config, "text_tokenizer": arguments.text_tokenizer,
            "semantic_weight": row.get("semantic_weight", 0.1), "learning_rate": 2e-3,
        }  # fmt: skip
        module = "image_tokenizer.ImageTokenizerModule"
        fit(folder / "tokenizer", module, tokenizer, arguments.data, arguments.tokenizer_steps)
        joint = {
            "text_tokenizer": arguments.text_tokenizer, "size": "mini", "learning_rate": 2e-3,
            "image_tokenizer": str(folder / "tokenizer/model"),
            "row_length": max(192, 2 * (64 // config["downsample"]) ** 2),
            "objectives": {"reconstruct_share": 0.0, "next_token_share": 0.5},
        }  # fmt: skip
        fit(folder / "joint", "joint.JointModule", joint, arguments.data, arguments.joint_steps)
    report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Measure all rows together, by one protocol, and write the table."""
    out: Path = arguments.out
    folders = {name: out / name.replace(" ", "-").replace(",", "") for name in arguments.only}
    compare = [
        sys.executable, "-m", "multimodal.cli", "tokenizer", "compare", "--data", arguments.data,
        "--output", out / "compare.json", "--picture", out / "table.png",
    ]  # fmt: skip
    compare += [folder / "tokenizer/model" for folder in folders.values()]
    subprocess.run([str(part) for part in compare], check=True)
    kept = json.loads((out / "compare.json").read_text())["tokenizers"]
    table = []
    for (name, folder), pictures in zip(folders.items(), kept, strict=True):
        learned = last_figures(folder / "joint")
        table.append({
            "name": name,
            **{k: pictures[k] for k in ("codes", "codebook_size", "psnr", "ms_ssim", "used")},
            "words": last_figures(folder / "tokenizer").get("val/words"),
            "claims_true": learned["val/scene_attribute_precision"],
            "objects_said": learned["val/scene_object_recall"],
            "image_nats": learned["val/image"],
        })  # fmt: skip
    protocol = {"tokenizer_steps": arguments.tokenizer_steps, "joint_steps": arguments.joint_steps}
    (out / "table.json").write_text(json.dumps({**protocol, "rows": table}, indent=1) + "\n")
    head = "| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0])
    lines = [
        "| "
        + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
        + " |"
        for row in table
    ]
    (out / "table.md").write_text("\n".join([head, *lines]) + "\n")
    print(json.dumps({**protocol, "rows": table}))


if __name__ == "__main__":
    main()
