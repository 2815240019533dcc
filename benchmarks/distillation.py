"""A student of a third of the parameters, with its teacher and from the data alone.

    python benchmarks/distillation.py --codes data/flickr8k-codes --data data/flickr8k
        [--teacher starter] [--layers 4] [--width 128] [--inner 384] [--weight 0.5]
        [--temperature 2] [--steps 1200] [--seeds 0] [--out runs/distillation]

Both students start from the same weights and read the same rows in the same order. They learn to
caption alone, so what the teacher draws is not asked of them. Measured is CIDEr on the split val of
--data, greedy, beside that of the teacher, with 95 % intervals. A run that is done is not done
again, one that was stopped is resumed, and one of other arguments needs another --out. The last
line is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from adapters import cider
from fits import fit
from safetensors.torch import save_file

from multimodal import load
from multimodal.files import write_json
from multimodal.model.layers.transformer import Transformer, TransformerConfig
from multimodal.model.stock import stock_config

HEAD_DIM = 64


def new_student(folder: Path, text_size: int, layers: int, width: int, inner: int) -> None:
    """A language model with random weights in a folder, as ``size`` takes it.

    So codes start at a tenth of the scale of texts (``grown_table``), 0.002 where a named size has
    0.02. Both students do, and AdamW moves each number that far within the warm-up.
    """
    torch.manual_seed(0)
    heads = width // HEAD_DIM
    config = TransformerConfig(
        text_size, width, layers, heads, max(1, heads // 2), HEAD_DIM, inner, True
    )
    folder.mkdir(parents=True, exist_ok=True)
    state = Transformer(config).stock_state_dict()
    save_file({name: value.detach() for name, value in state.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", stock_config(config))


def parameters(model: str) -> int:
    return sum(weight.numel() for weight in load(model).network.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", required=True, help="a shard folder of codes, to train on")
    parser.add_argument("--data", required=True, help="the same images, to measure on")
    parser.add_argument("--teacher", default="starter")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--inner", type=int, default=384, help="width of the MLPs")
    parser.add_argument("--weight", type=float, default=0.5, help="of the teacher, 0 to 1")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    options = parser.parse_args()
    teacher = load(options.teacher)
    # Other widths do not change the student of the runs that are there.
    size = options.out / f"size-{options.layers}-{options.width}-{options.inner}"
    if options.width % HEAD_DIM:
        parser.error(f"--width {options.width}: not a multiple of {HEAD_DIM}")
    new_student(size, len(teacher.text_tokenizer), options.layers, options.width, options.inner)
    rows: dict[str, Any] = {
        "teacher": {
            "parameters": parameters(options.teacher),
            **cider(options.out, options.data, "--model", options.teacher),
        }
    }
    for seed in options.seeds:
        for kind, weight in (("taught", options.weight), ("alone", 0.0)):
            folder = options.out / f"{kind}-{seed}"
            module = {
                "teacher": options.teacher,
                "teacher_weight": weight,
                "temperature": options.temperature,
                "text_tokenizer": options.teacher,
                "image_tokenizer": options.teacher,
                "size": str(size),
                "reads": [*teacher.config.reads],
                "draws": [*teacher.config.draws],
                "row_length": 240,
                "captions_per_image": 5,
                "dropout": 0.05,
                "objectives": {
                    "alignment_weight": 0.0,
                    "reconstruct_share": 0.0,
                    "next_token_share": 0.0,
                },
                "learning_rate": options.rate,
                "warmup_steps": min(60, options.steps // 10),
                "captions_in_validation": 100,
            }
            data = {"folders": [options.codes], "global_batch_size": 32, "val_limit": 200}
            fit(folder, "distill.DistillModule", module, data | {"workers": 0}, options.steps, seed)
            student = str(folder / "model")
            rows[f"{kind}-{seed}"] = {
                "parameters": parameters(student),
                **cider(folder, options.data, "--model", student),
                "seconds": float((folder / "seconds").read_text("utf-8")),
            }
            print(kind, seed, json.dumps(rows[f"{kind}-{seed}"]), flush=True)
    print(json.dumps({name: str(value) for name, value in vars(options).items()} | rows))


if __name__ == "__main__":
    main()
