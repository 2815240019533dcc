"""Seconds of a training step on a CPU, with torch's attention and malloc and with ours.

    python benchmarks/cpu_training.py [--size mini] [--pairs 64] [--row-length 192] [--steps 18]

Each setting runs in another process, one after the other: options of malloc cannot be taken back. A
step is the joint step of a photo batch: 64 pairs, forward, backward, clipping, Muon, bf16.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace

SETTINGS = {
    "torch's attention, glibc as it is": (False, False),
    "torch's attention, freed memory kept": (False, True),
    "written-out attention, glibc as it is": (True, False),
    "both (as multimodal fit does)": (True, True),
}


def measure(written_out: bool, keep: bool, size: str, pairs: int, length: int, steps: int) -> float:
    """The median seconds of a step, without the first six."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import multimodal.model.layers.transformer
    from multimodal.api import Model
    from multimodal.memory import keep_freed_memory
    from multimodal.model.batches import BatchBuilder
    from multimodal.model.objectives import ObjectivesConfig
    from multimodal.model.training_batch import TrainingSample
    from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
    from multimodal.tokenizers.image import ImageTokenizer
    from multimodal.tokenizers.text import TextTokenizer
    from multimodal.train.optim import muon

    if keep:
        keep_freed_memory()
    if not written_out:

        def attend(q, k, v, mask):  # type: ignore[no-untyped-def]
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        multimodal.model.layers.transformer.attend = attend
    torch.manual_seed(0)
    text = "A brown dog runs over the grass with a red ball in its mouth ."
    tokenizer = TextTokenizer.train([text], 320)
    shares = ObjectivesConfig(reconstruct_share=0.2, next_token_share=0.1)
    model = Model.new(
        size, tokenizer, ImageTokenizer(detail=VQTokenizer(VQTokenizerConfig())), shares
    )
    network = model.network
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = muon(network, [], 1e-3, 0.1)
    codes = torch.randint(0, 4375, (pairs, 64)).numpy()
    builder = BatchBuilder(
        network.vocabulary,
        shares,
        network.config.templates,
        tokenizer.encode,
        network.config.layout,
        network.config.reads,
        network.config.draws,
        length,
    )
    batch = builder.build(
        [
            TrainingSample(str(number), {"captions": [text]}, codes[number, None], number)
            for number in range(pairs)
        ]
    )
    # The texts count as different ones.
    batch = replace(batch, image_hashes=torch.arange(pairs), text_hashes=torch.arange(pairs))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = network(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[6:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="mini")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--row-length", type=int, default=192)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.size, options.pairs, options.row_length, options.steps)
    if options.one:
        print(measure(*SETTINGS[options.one], *shape))
        return
    seconds = {}
    for name in SETTINGS:
        command = [sys.executable, __file__, "--one", name, "--size", options.size]
        command += ["--pairs", str(options.pairs), "--row-length", str(options.row_length)]
        command += ["--steps", str(options.steps)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
        seconds[name] = float(done.stdout)
        print(f"{seconds[name]:6.3f} s a step   {name}", flush=True)
    first, last = next(iter(seconds.values())), list(seconds.values())[-1]
    print(f"{first / last:.2f} times faster with both")
    figures = {
        "seconds_a_step": seconds,
        "times_faster": first / last,
        "size": options.size,
        "pairs": options.pairs,
        "row_length": options.row_length,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
