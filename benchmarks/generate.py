"""Captions a second: ours beside transformers' ``generate`` with the same exported weights.

    python benchmarks/generate.py [--model starter] [--batches 1 32] [--rounds 5]

The codes of the images are given to both, fp32, greedy, up to 32 tokens, KV cache on. Both take
turns, so that what else the machine does falls on both. Says how many captions are equal, token for
token; the last line is JSON.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from multimodal import load
from multimodal.export import export_hf
from multimodal.generation import continue_text, encode_images, read_images
from multimodal.scenes import render, sample_scene
from multimodal.sequences import describe_prompt

TOKENS = 32


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", default="starter")
    made.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    made.add_argument("--rounds", type=int, default=5)
    arguments = made.parse_args()
    model = load(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        export_hf(arguments.model, Path(folder) / "hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf")
    theirs = theirs.float().eval()
    vocabulary = model.vocabulary
    rng = random.Random("generate")
    pictures = [render(sample_scene(rng)) for _ in range(max(arguments.batches))]
    codes = (encode_images(model, read_images(model, pictures)) + vocabulary.image_start).tolist()
    prompts = [describe_prompt(vocabulary, row) for row in codes]
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": vocabulary.eos,
                "pad_token_id": vocabulary.pad}  # fmt: skip
    figures = {}
    for batch in arguments.batches:
        ours_ids: list[list[int]] = []
        theirs_ids: list[list[int]] = []

        def ours(batch: int = batch, out: list[list[int]] = ours_ids) -> None:
            out[:] = continue_text(model, prompts[:batch], TOKENS)

        @torch.inference_mode()
        def peer(batch: int = batch, out: list[list[int]] = theirs_ids) -> None:
            ids = torch.tensor(prompts[:batch])
            found = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            out[:] = [
                row[: row.index(vocabulary.eos)] if vocabulary.eos in row else row
                for row in found[:, ids.shape[1] :].tolist()
            ]

        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(arguments.rounds + 1):  # the first is to warm up
            times["ours"].append(seconds_of(ours))
            times["transformers"].append(seconds_of(peer))
        speeds = {name: batch / statistics.median(taken[1:]) for name, taken in times.items()}
        figures[f"batch {batch}"] = {
            **speeds,
            "ratio": speeds["ours"] / speeds["transformers"],
            "equal": sum(a == b for a, b in zip(ours_ids, theirs_ids, strict=True)),
        }
        print(batch, figures[f"batch {batch}"])
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__,
             "transformers": transformers.__version__, "rounds": arguments.rounds}  # fmt: skip
    print(json.dumps({"model": model.fingerprint, "captions_per_second": figures, **about}))


if __name__ == "__main__":
    main()
