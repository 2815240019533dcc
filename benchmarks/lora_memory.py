"""What a step of training takes: a full one, and adapters (LoRA) over weights of 32, 16 and 8 bits.

    python benchmarks/lora_memory.py [--size base] [--pairs 4] [--row-length 256] [--r 16]
        [--steps 3] [--recompute] [--kinds int8 float32 ...] [--out FILE]

Each row is a process of its own. Weights are random: they decide neither memory nor time. 4 bits
are a way to store weights; in memory they are 8 (multimodal/model/layers/quantization.py).

weights_MB: the tensors of the network with its adapter.
peak_MB: the most memory that the process has while it trains, above what it has before it makes the
    network. Linux only.
seconds: of a step, the median without the first.

The last line is JSON.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = {  # of the frozen weights, and the dtype of all else
    "int8": "float32",
    "int8 in bfloat16": "bfloat16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "full": "float32",
}
TEXT = "A brown dog runs over the grass with a red ball in its mouth ."


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, those it has, or VmHWM, the most that it had."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from multimodal.adapters.lora import LoraConfig, adapter_parts, inject
    from multimodal.api import Model
    from multimodal.export.quantize import quantized_network
    from multimodal.model.training_batch import TrainingSample
    from multimodal.tokenizers.detail import VQTokenizer, VQTokenizerConfig
    from multimodal.tokenizers.image import ImageTokenizer
    from multimodal.tokenizers.text import TextTokenizer
    from multimodal.train.optim import muon

    torch.manual_seed(0)
    text = TextTokenizer.train([TEXT], 320)
    vq = {"name": "vq", "codebook_size": 16384, "channels": 8}
    images = ImageTokenizer(detail=VQTokenizer(VQTokenizerConfig(quantizer=vq)))
    model = Model.new("tiny", text, images)
    codes = torch.randint(0, 16384, (options.pairs, images.codes_per_image)).numpy()
    samples = [
        TrainingSample(str(number), {"captions": [TEXT]}, image[None], number)
        for number, image in enumerate(codes)
    ]
    batch = model.batch_builder(options.row_length).build(samples)
    # A step of a tiny adapter loads what torch and peft load late.
    inject(model.network.transformer, LoraConfig(1))
    model.network(batch)[0].backward()
    gc.collect()
    before = resident("VmRSS")
    network = Model.new(options.size, text, images).network
    if kind.startswith("int8"):
        network = quantized_network(network, 8)
    if kind != "full":
        network.requires_grad_(False)
        inject(network.transformer, LoraConfig(options.r))
    network.to(getattr(torch, KINDS[kind]))
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = muon(network, adapter_parts(network.transformer), 1e-3, 0.1)
    network.train()
    network.transformer.recompute = len(network.transformer.layers) if options.recompute else 0
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # VmHWM starts anew
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        loss, _ = network(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    tensors = {id(weight): weight for weight in network.parameters()}.values()
    return {
        "trained": sum(weight.numel() for weight in trained),
        "frozen": sum(w.numel() for w in tensors) - sum(w.numel() for w in trained),
        "weights_MB": sum(weight.nbytes for weight in tensors) / 1e6,
        "peak_MB": (resident("VmHWM") - before) / 1e6,
        "seconds": statistics.median(seconds[1:]),
        "loss": loss.item(),
        "tokens": batch.tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="base", help="a named size")
    parser.add_argument("--pairs", type=int, default=4, help="of an image and a caption")
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute", action="store_true", help="as model.recompute")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)  # of a process
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: expected 2 or more, for the first is not timed")
    if options.kind is not None:
        print(json.dumps(measure(options.kind, options)))
        return
    rows = {}
    for kind in options.kinds:
        command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
        rows[kind] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind}: {json.dumps(rows[kind])}", flush=True)
    about = {"size": options.size, "r": options.r, "recompute": options.recompute}
    found = json.dumps({**about, "cores": os.cpu_count(), "rows": rows})
    if options.out is not None:
        options.out.write_text(f"{found}\n", "utf-8")
    print(found)


if __name__ == "__main__":
    main()
