"""How good codes are: quantizers, codebook sizes and token counts at one budget.

    python benchmarks/quantizers.py --data data/scenes --text-tokenizer runs/scenes-text.json \
        [--out runs/quantizers] [--tokenizer-steps 400] [--joint-steps 160] [--only NAME ...]

For every row a tokenizer is trained on the same images, and on its codes a small joint model on
about the same number of tokens. Measured are the image quality (``multimodal tokenizer compare``),
the share of the claims of captions that are true, the share of the objects of drawings that are
right, and the nats of a code. A row that is done is not done again. Writes ``table.md``,
``table.json`` and ``table.png`` into the folder.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fits import fit, last_figures, markdown, score_captions, score_drawings

from multimodal import load

SIZE, TEXT_TOKENS = 64, 20  # pixels of a side; tokens of a caption, about
VIT = {"name": "vit", "dim": 128, "encoder_depth": 0, "decoder_depth": 2, "heads": 4}
FSQ = {"name": "fsq", "levels": [3] * 7}
VQ = {"name": "vq", "codebook_size": 2048, "channels": 8}
ROWS: dict[str, dict[str, Any]] = {
    "fsq 2187": {"quantizer": FSQ},
    "fsq 2187, no words": {"quantizer": FSQ, "semantic_weight": 0.0},
    "vq 2048": {"quantizer": VQ},
    "vq 2048, gradient": {"quantizer": {**VQ, "learning": "gradient"}},
    "lfq 2048": {"quantizer": {"name": "lfq", "channels": 11}},
    "ibq 2048": {"quantizer": {"name": "ibq", "codebook_size": 2048, "channels": 8}},
    "fsq 243": {"quantizer": {"name": "fsq", "levels": [3] * 5}},
    "fsq 2187, 16 codes": {"quantizer": FSQ, "downsample": 16},
    "fsq 2187, 256 codes": {"quantizer": FSQ, "downsample": 4},
    "fsq 2187, words 1": {"quantizer": FSQ, "semantic_weight": 1.0},
    "vq 256": {"quantizer": {**VQ, "codebook_size": 256}},
}


def steps_of_equal_tokens(steps: int, downsample: int) -> int:
    """Images of fewer codes get more steps. ``steps`` is for images of 64 codes."""
    return round(steps * (64 + TEXT_TOKENS) / ((SIZE // downsample) ** 2 + TEXT_TOKENS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--text-tokenizer", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/quantizers"))
    parser.add_argument("--tokenizer-steps", type=int, default=400)
    parser.add_argument("--joint-steps", type=int, default=160, help="0: none")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    for name in arguments.only:
        row, folder = ROWS[name], arguments.out / name.replace(" ", "-").replace(",", "")
        config = {
            "image_size": SIZE,
            "downsample": row.get("downsample", 8),
            "autoencoder": row.get("autoencoder", VIT),
            "quantizer": row["quantizer"],
        }
        tokenizer = {
            "tokenizer": config,
            "text_tokenizer": arguments.text_tokenizer,
            "semantic_weight": row.get("semantic_weight", 0.1),
            "learning_rate": 2e-3,
        }
        module = "image_tokenizer.DetailModule"
        data = {"folders": [arguments.data]}
        fit(folder / "tokenizer", module, tokenizer, data, arguments.tokenizer_steps)
        if not arguments.joint_steps:
            continue
        joint = {
            "text_tokenizer": arguments.text_tokenizer,
            "size": "mini",
            "learning_rate": 2e-3,
            "image_tokenizer": str(folder / "tokenizer/model"),
            "row_length": max(192, 2 * (SIZE // config["downsample"]) ** 2),
            "objectives": {"reconstruct_share": 0.0, "next_token_share": 1.0},
            "answers_in_validation": 0,
            "drawings_in_validation": 0,
        }
        steps = steps_of_equal_tokens(arguments.joint_steps, config["downsample"])
        fit(folder / "joint", "joint.JointModule", joint, {**data, "val_limit": 256}, steps)
    report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Measure all rows together, by one protocol, and write the table."""
    out: Path = arguments.out
    folders = {name: out / name.replace(" ", "-").replace(",", "") for name in arguments.only}
    compare = [
        sys.executable,
        "-m",
        "multimodal.cli",
        "tokenizer",
        "compare",
        "--data",
        arguments.data,
        "--output",
        out / "compare.json",
        "--picture",
        out / "table.png",
    ]
    compare += [folder / "tokenizer/model" for folder in folders.values()]
    subprocess.run([str(part) for part in compare], check=True)
    measured = json.loads((out / "compare.json").read_text("utf-8"))["tokenizers"]
    table = []
    for (name, folder), pictures in zip(folders.items(), measured, strict=True):
        table.append(
            {
                "name": name,
                **{k: pictures[k] for k in ("codes", "codebook_size", "psnr", "ms_ssim", "used")},
                "words": last_figures(folder / "tokenizer").get("val/words"),
            }
        )
        if not arguments.joint_steps:
            continue
        learned = last_figures(folder / "joint")
        model = load(folder / "joint/model")
        captions = score_captions(model, arguments.data)
        drawn = score_drawings(model, arguments.data)
        table[-1].update(
            {
                "claims_true": captions["attribute_precision"],
                "objects_said": captions["object_recall"],
                "image_nats": learned["val/image"],
                "objects_drawn": drawn["objects"],
                "colours_drawn": drawn["colours"],
            }
        )
    protocol = {"tokenizer_steps": arguments.tokenizer_steps, "joint_steps": arguments.joint_steps}
    (out / "table.json").write_text(
        json.dumps({**protocol, "rows": table}, indent=1) + "\n", "utf-8"
    )
    (out / "table.md").write_text(markdown(table), "utf-8")
    print(json.dumps({**protocol, "rows": table}))


if __name__ == "__main__":
    main()
