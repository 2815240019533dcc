"""A joint step, and steps of plain language modelling: ours and that of transformers' Qwen3.

    python benchmarks/train_step.py [--size mini] [--pairs 32] [--vocabulary 4096] [--steps 16]

All read the same packed rows of image codes and captions, in bf16 on a CPU, or on a GPU if there is
one. Each is measured in another process, in turn, --rounds times, and the best median counts.
Padding does not count as tokens. Theirs reads the rows causally without a mask, which is fastest
for it. ``kept``: freed memory is kept, as `multimodal fit` does on a CPU.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

CODES, TEXT = 64, "A brown dog runs over the grass with a red ball in its mouth ."
SETTINGS = {
    "joint, Muon": ("ours", True),
    "joint, AdamW": ("ours", True),
    "joint, Muon, compiled": ("ours", True),
    "joint, AdamW, compiled": ("ours", True),
    "plain LM, Muon": ("ours", True),
    "plain LM, AdamW": ("ours", True),
    "transformers, AdamW": ("theirs", False),
    "transformers, AdamW, kept": ("theirs", True),
    "transformers, AdamW, compiled": ("theirs", False),
    "transformers, AdamW, compiled, kept": ("theirs", True),
}


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """The seconds of a step, its tokens, and the peak memory in GB of one setting."""
    import torch

    from multimodal.api import Model
    from multimodal.memory import keep_freed_memory
    from multimodal.model.batches import BatchBuilder
    from multimodal.model.objectives import ObjectivesConfig
    from multimodal.model.sequences import NO_LOSS, OBJECTIVES
    from multimodal.model.training_batch import TrainingSample
    from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
    from multimodal.tokenizers.image import ImageTokenizer
    from multimodal.tokenizers.text import TextTokenizer
    from multimodal.train.cost import peak_memory
    from multimodal.train.optim import muon

    whose, kept = SETTINGS[name]
    if kept:
        keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train([TEXT], 320)
    codebook = options.vocabulary - 320 - 7
    vq = {"name": "vq", "codebook_size": codebook, "channels": 8}
    shares = ObjectivesConfig(reconstruct_share=0.5, next_token_share=0.5)
    images = ImageTokenizer(detail=VQTokenizer(VQTokenizerConfig(quantizer=vq)))
    network = Model.new(options.size, tokenizer, images, shares).to(device).network
    codes = torch.randint(0, codebook, (options.pairs, CODES)).numpy()
    builder = BatchBuilder(
        network.vocabulary,
        shares,
        network.config.templates,
        tokenizer.encode,
        network.config.layout,
        network.config.reads,
        network.config.draws,
        options.row_length,
    )
    batch = builder.build(
        [
            TrainingSample(str(number), {"captions": [TEXT]}, codes[number, None], number)
            for number in range(options.pairs)
        ]
    )
    # The texts count as different ones.
    ids = torch.arange(options.pairs)
    batch = replace(batch, image_hashes=ids, text_hashes=ids)
    packed = batch.packed
    tokens = packed.documents > 0
    step: Callable[[], torch.Tensor]
    if whose == "theirs":
        from on_card.training import their_config
        from transformers import Qwen3ForCausalLM

        config = their_config(network)
        config.use_cache = False
        trained: Any = Qwen3ForCausalLM(config).to(device).train()
        call = torch.compile(trained) if "compiled" in name else trained
        rows = packed.ids.to(device)
        labels = rows.masked_fill(~tokens.to(device), -100)

        def step() -> torch.Tensor:
            loss: torch.Tensor = call(input_ids=rows, labels=labels).loss
            return loss
    else:
        trained = network.train()
        if "compiled" in name:
            network.transformer.compile()
        if name.startswith("plain"):
            following = torch.zeros_like(packed.ids)
            following[:, :-1] = packed.ids[:, 1:]
            last = packed.documents != torch.nn.functional.pad(packed.documents[:, 1:], (0, 1))
            packed.targets, packed.blocks = following, torch.zeros_like(packed.blocks)
            packed.objectives = torch.where(last | ~tokens, NO_LOSS, OBJECTIVES.index("text"))
            plain = ObjectivesConfig(weights={"text": 1.0}, alignment_weight=0.0)
            object.__setattr__(network.config, "objectives", plain)
        batch = batch.to(torch.device(device))

        def step() -> torch.Tensor:
            loss: torch.Tensor = network(batch)[0]
            return loss

    if "Muon" in name:
        optimizer: Any = muon(trained, [], 1e-3, 0.1)
    else:
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.1, fused=True)
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times[options.steps // 3 :]),
        "tokens": batch.tokens,
        "GB": peak_memory(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="mini")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--row-length", type=int, default=176)
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids, with those of text")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            command = [sys.executable, *sys.argv, "--one", name]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            last = results[name][-1]
            print(
                f"{name:<38}{last['tokens'] / last['seconds']:>9,.0f} tokens/s {last['GB']:.2f} GB",
                file=sys.stderr,
                flush=True,
            )
    best = {name: min(rounds, key=lambda r: r["seconds"]) for name, rounds in results.items()}
    speed = {name: r["tokens"] / r["seconds"] for name, r in best.items()}
    ratios = {}
    for ours in (name for name in SETTINGS if name.startswith("joint")):
        for other in speed:
            if ours in speed and other != ours:
                ratios[f"{ours} / {other}"] = round(speed[ours] / speed[other], 2)
    import torch
    import transformers

    print(
        json.dumps(
            {
                "tokens_per_second": {name: round(value) for name, value in speed.items()},
                "GB": {name: round(r["GB"], 2) for name, r in best.items()},
                "ratios": ratios,
                "size": options.size,
                "pairs": options.pairs,
                "vocabulary": options.vocabulary,
                "row_length": options.row_length,
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
