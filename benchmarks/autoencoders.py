"""Image quality after equal training time: the ViT of the photos recipe and the VQGAN of LlamaGen.

    python benchmarks/autoencoders.py --data data/flickr8k [--out runs/autoencoders] [--minutes 4]

Both are trained from random weights on the training split at 128 x 128 pixels, to 8 x 8 codes of
one codebook size, on pixels alone, by the same optimizer. They are measured on val by ``multimodal
tokenizer compare``. The rows are

- the ViT,
- the VQGAN in its released shape (72 M parameters), for the same wall-clock time,
- a VQGAN a quarter as wide, with about the parameters of the ViT, for the same time,
- the narrow VQGAN for the same steps.

How many steps fit the time is measured first, by steps in turn. A row that is done is not done
again. Writes ``table.md``, ``table.json`` and ``table.png`` into the folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fits import fit, markdown

from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
from multimodal.train.optim import muon

SIZE, DOWNSAMPLE, BATCH = 128, 16, 32
VIT = {
    "autoencoder": {"name": "vit", "dim": 192, "encoder_depth": 2, "decoder_depth": 3, "heads": 4},
    "quantizer": {"name": "fsq", "levels": [3] * 7},
}
VQ = {"name": "vq", "codebook_size": 2187, "channels": 8, "learning": "gradient"}
RELEASED = {"autoencoder": {"name": "vqgan"}, "quantizer": VQ}
NARROW = {"autoencoder": {"name": "vqgan", "channels": 32, "latent_channels": 64}, "quantizer": VQ}
SHAPES = {"vit": VIT, "vqgan": RELEASED, "narrow vqgan": NARROW}


def config_of(shape: dict[str, Any]) -> dict[str, Any]:
    return {"image_size": SIZE, "fit": "squash", "downsample": DOWNSAMPLE, **shape}


def step_seconds(rounds: int = 4) -> dict[str, float]:
    """Seconds of a training step of each, the median of steps in turn."""
    torch.manual_seed(0)
    images = torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1
    models = {
        name: VQTokenizer(VQTokenizerConfig(**config_of(shape))) for name, shape in SHAPES.items()
    }
    optimizers = {name: muon(model, [], 1e-4, 0.0) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                reconstruction, quantized = model(images)
            loss = F.mse_loss(reconstruction.float(), images) + sum(quantized.losses.values())
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoders"))
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, for each")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "step_seconds.json").is_file():
        (out / "step_seconds.json").write_text(json.dumps(step_seconds()) + "\n", "utf-8")
    seconds = json.loads((out / "step_seconds.json").read_text("utf-8"))
    fitting = {name: round(60 * arguments.minutes / step) for name, step in seconds.items()}
    rows = [(name, shape, fitting[name]) for name, shape in SHAPES.items()]
    rows.append(("narrow vqgan, equal steps", NARROW, fitting["vit"]))
    for name, shape, steps in rows:
        tokenizer = {
            "tokenizer": config_of(shape),
            "learning_rate": 1.5e-3,
            "warmup_steps": max(1, min(100, steps // 10)),
        }
        data = {
            "folders": [arguments.data],
            "global_batch_size": BATCH,
            "crop_scale": 0.4,
            "mirror": True,
            "val_limit": 256,
        }
        module = "image_tokenizer.DetailModule"
        fit(out / name.replace(" ", "-").replace(",", ""), module, tokenizer, data, steps)
    compare = [
        sys.executable,
        "-m",
        "multimodal.cli",
        "tokenizer",
        "compare",
        "--data",
        arguments.data,
        "--fit",
        "squash",
        "--limit",
        "256",
        "--batch-size",
        "16",
        "--output",
        out / "compare.json",
        "--picture",
        out / "table.png",
    ]
    folders = [out / name.replace(" ", "-").replace(",", "") for name, _, _ in rows]
    compare += [folder / "model" for folder in folders]
    subprocess.run([str(part) for part in compare], check=True)
    measured = json.loads((out / "compare.json").read_text("utf-8"))
    figures = ("psnr", "ssim", "ms_ssim", "perceptual", "used", "parameters")
    table = [
        {
            "name": name,
            "steps": steps,
            "images": steps * BATCH,
            "seconds": int((folder / "seconds").read_text("utf-8")),
            **{k: row[k] for k in figures},
        }
        for (name, _, steps), folder, row in zip(rows, folders, measured["tokenizers"], strict=True)
    ]
    result = {"step_seconds": seconds, "protocol": measured["protocol"], "rows": table}
    (out / "table.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (out / "table.md").write_text(markdown(table), "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
