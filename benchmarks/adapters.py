"""An adapter (LoRA) against full fine-tuning and against the model as it is.

    python benchmarks/adapters.py --data data/mine [--model starter] [--steps 80 80] [--r 16]
        [--rates 2e-3 5e-3] [--seeds 0 1 2] [--out runs/adapters] [-- --KEY VALUE ...]

The recipe is finetune.yaml, and what follows ``--`` goes to both runs. Each run is a process of its
own, so its peak memory is its own. On a CPU that of imports is subtracted, or peft would count as
memory of LoRA. Measured is CIDEr on the split val (greedy), of the best validation. A run that is
done is not done again, and one of other arguments needs another --out. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fits import last_figures, measured_once
from safetensors import safe_open

from multimodal import load
from multimodal.files import write_json

KINDS = ("full", "lora")
# A step of a tiny network, for torch and peft import more when they are first used.
BEFORE = """
import sys, torch
import multimodal.train.cli, multimodal.train.joint
from multimodal.train.cost import peak_memory
network = torch.nn.Sequential(torch.nn.Linear(8, 8))
if sys.argv[1] == "lora":
    import peft
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=["0"]), network)
network(torch.ones(1, 8)).sum().backward()
torch.optim.AdamW(weight for weight in network.parameters() if weight.requires_grad).step()
print(peak_memory())
"""


def multimodal(*arguments: str) -> float:
    """Run a command in a process of its own. Returns its seconds."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "multimodal", *arguments], check=True, stdout=sys.stderr)
    return time.monotonic() - start


def fit_once(folder: Path, *arguments: str) -> float:
    """Run ``multimodal fit`` into a folder, unless it is done. Returns its seconds.

    A run that was stopped begins anew: its memory and its seconds are those of a whole one.

    Raises:
        SystemExit: for a folder that holds a run of other arguments.
    """
    written, done = folder / "arguments.json", folder / "seconds"
    stored = json.loads(written.read_text("utf-8")) if written.is_file() else None
    if stored != [*arguments]:
        if folder.is_dir() and any(folder.iterdir()):
            sys.exit(f"{folder}: holds a run of other arguments; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(written, arguments)
    if not done.is_file():
        seconds = multimodal("fit", *arguments, "--output", str(folder), "--overwrite")
        done.write_text(f"{seconds:.0f}\n", "utf-8")
    return float(done.read_text("utf-8"))


def memory_before(kind: str) -> float:
    """GB that a process of such a run has before it makes its network. 0 on a GPU."""
    if torch.cuda.is_available():
        return 0.0  # the memory of a run is that of the GPU
    command = [sys.executable, "-c", BEFORE, kind]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return float(done.stdout)


def cider(folder: Path, data: str, *model: str) -> dict[str, Any]:
    """CIDEr with its interval, as ``multimodal eval captioning`` writes it. Measured once."""

    def measure() -> dict[str, Any]:
        results = folder / "results.json"
        multimodal("eval", "captioning", "--data", data, *model, "--output", str(results))
        (result,) = json.loads(results.read_text("utf-8"))["results"]
        return dict(result["scores"])

    scores = measured_once(folder, "captioning", {"data": data, "model": model}, measure)
    return {name: value for name, value in scores.items() if name.startswith("CIDEr")}


def numbers(weights: Path) -> int:
    """How many numbers a file of weights has."""
    with safe_open(weights, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a shard folder with captions")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--steps", type=int, nargs=2, default=[80, 80], help="of full, of LoRA")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rates", nargs=2, default=["2e-3", "5e-3"], help="of full, of LoRA")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    parser.add_argument("more", nargs="*", metavar="--KEY VALUE", help="after --, of fit")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {"base": cider(options.out, options.data, "--model", options.model)}
    before = {kind: memory_before(kind) for kind in KINDS}
    for seed in options.seeds:
        for kind, steps, rate in zip(KINDS, options.steps, options.rates, strict=True):
            folder = options.out / f"{kind}-{seed}"
            exported = folder / ("model" if kind == "full" else "adapter")
            fit = ["--config", "finetune.yaml", "--data.folders", f"[{options.data}]"]
            fit += ["--init_from", options.model]
            fit += ["--seed_everything", str(seed), "--model.learning_rate", rate]
            fit += ["--trainer.max_steps", str(steps), *options.more]
            fit += [f"--model.{part}_tokenizer={options.model}" for part in ("text", "image")]
            fit += ["--model.lora.r", str(options.r)] if kind == "lora" else []
            seconds = fit_once(folder, *fit)
            use = ["--model", str(exported)]
            if kind == "lora":
                use = ["--model", options.model, "--adapter", str(exported)]
            rows[f"{kind}-{seed}"] = {
                **cider(folder, options.data, *use),
                "memory_GB": last_figures(folder)["memory_GB"] - before[kind],
                "seconds": seconds,
                "trained": numbers(exported / "adapter_model.safetensors")
                if kind == "lora"
                else sum(weight.numel() for weight in load(exported).network.parameters()),
            }
            print(kind, seed, json.dumps(rows[f"{kind}-{seed}"]), flush=True)
    print(json.dumps({"data": options.data, "steps": options.steps, "r": options.r, **rows}))


if __name__ == "__main__":
    main()
