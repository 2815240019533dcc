"""Captions and drawings a second: ours beside transformers' ``generate`` and open_clip's CoCa.

    python benchmarks/generate.py [--model starter] [--dtype float32] [--rounds 5]
        [--only captions coca drawing]

captions: of scenes, from their codes. Both have the same exported weights in the same --dtype (the
    starter's are stored in bfloat16). Greedy, up to 32 tokens, with a KV cache: one after the
    other, and 128 in batches of 32 (ours lets others join when texts are done). Reports how many
    are equal, token for token.
coca: open_clip's CoCa with about as many parameters and random weights, in two shapes: that of its
    ``coca_base`` (12 layers each for image, text and both), but narrower, and 2 layers each as wide
    as ours. From pixels to as many tokens as our caption of the image has, as its own ``generate``
    works (the image is read once, no cache, a batch goes on until its longest text ends), but
    greedy. Ours starts from pixels, too. 8 one after the other, and 32 at once.
drawing: masked in 8 steps and code by code, guidance 3, for several batch sizes. Compiled, too.

All take turns, so that other load of the machine affects all, in one process. It keeps freed memory
as every command of ``multimodal`` does. The last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from multimodal import load
from multimodal.api import Model
from multimodal.export.hf import export_hf
from multimodal.inference.codec import encode_images, read_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.text import caption_codes, generate_ids
from multimodal.memory import keep_freed_memory
from multimodal.model.sequences import describe_prompt
from multimodal.options import DrawOptions, Method, TextOptions
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene

TOKENS, FEW, BATCH, MANY = 32, 8, 32, 128
GREEDY = TextOptions(max_tokens=TOKENS)
METHODS: dict[str, Method] = {"ours, masked": "masked", "code by code": "causal"}


def speeds(
    work: dict[str, Callable[[], object]], rounds: int, count: int
) -> dict[str, dict[str, float]]:
    """Results a second of each, and the ratios of ours to theirs.

    They are of the median of the rounds. In each round all take turns.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):  # the first is to warm up
        for name, task in work.items():
            start = time.perf_counter()
            task()
            if number:
                times[name].append(time.perf_counter() - start)
    a_second = {name: count / statistics.median(taken) for name, taken in times.items()}
    ours = max(value for name, value in a_second.items() if name.startswith("ours"))
    ratios = {name: ours / value for name, value in a_second.items() if "ours" not in name}
    figures = {"per_second": a_second, "best of ours over": ratios}
    print(json.dumps(figures), flush=True)
    return figures


def captions(
    model: Model, compiled: Model, name: str, prompts: list[list[int]], rounds: int
) -> Any:
    """Captions a second.

    Args:
        name: of the model.
        prompts: MANY lists of ids of one length.
    """
    v = model.vocabulary
    dtype = model.network.transformer.embed_tokens.weight.dtype
    with tempfile.TemporaryDirectory() as folder:
        export_hf(name, Path(folder) / "hf")
        eager, faster = (
            transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf").to(dtype).eval()
            for _ in range(2)
        )
    faster.forward = torch.compile(faster.forward, dynamic=False)
    settings = {
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "eos_token_id": v.eos,
        "pad_token_id": v.pad,
    }
    outputs: dict[str, list[list[int]]] = {}

    @torch.inference_mode()
    def theirs(
        peer: Any, batch_prompts: list[list[int]], size: int, **more: Any
    ) -> list[list[int]]:
        out = []
        for start in range(0, len(batch_prompts), size):
            ids = torch.tensor(batch_prompts[start : start + size])
            rows = peer.generate(ids, attention_mask=torch.ones_like(ids), **settings, **more)
            out += [
                row[: row.index(v.eos)] if v.eos in row else row
                for row in rows[:, ids.shape[1] :].tolist()
            ]
        return out

    def into(name: str, generate: Callable[[], list[list[int]]]) -> Callable[[], object]:
        return lambda: outputs.update({name: generate()})

    few = prompts[:FEW]
    static = {"cache_implementation": "static"}
    one_by_one = {
        "ours": into("ours", lambda: [generate_ids(model, [p], GREEDY)[0] for p in few]),
        "ours, compiled": into(
            "ours, compiled", lambda: [generate_ids(compiled, [p], GREEDY)[0] for p in few]
        ),
        "transformers": into("transformers", lambda: theirs(eager, few, 1)),
        "transformers, compiled": into(
            "transformers, compiled", lambda: theirs(faster, few, 1, **static)
        ),
    }
    results: dict[str, Any] = {"batch 1": speeds(one_by_one, rounds, len(few))}
    results["batch 1"]["equal"] = {
        name: sum(a == b for a, b in zip(outputs["ours"], ids, strict=True))
        for name, ids in outputs.items()
    }
    together = {
        "ours": into("ours", lambda: generate_ids(model, prompts, GREEDY, batch_size=BATCH)),
        "ours, compiled": into(
            "ours, compiled", lambda: generate_ids(compiled, prompts, GREEDY, batch_size=BATCH)
        ),
        "transformers": into("transformers", lambda: theirs(eager, prompts, BATCH)),
        "transformers, compiled": into(
            "transformers, compiled", lambda: theirs(faster, prompts, BATCH, **static)
        ),
    }
    results[f"batch {BATCH}"] = speeds(together, rounds, len(prompts))
    results[f"batch {BATCH}"]["equal"] = {
        name: sum(a == b for a, b in zip(outputs["ours"], outputs[name], strict=True))
        for name in together
    }
    lengths = [len(text) for text in outputs["ours"]]
    return {**results, "mean_tokens": statistics.mean(lengths), "longest": max(lengths)}


def coca(
    model: Model, compiled: Model, pixels: torch.Tensor, lengths: list[int], rounds: int
) -> Any:
    """Captions a second, from pixels.

    Args:
        pixels: float32[BATCH, 3, H, W] in [-1, 1].
        lengths: tokens of our BATCH captions, with <eos>.
    """
    from open_clip.coca_model import CoCa

    size, v = model.image_tokenizer.image_size, model.vocabulary
    dtype = model.network.transformer.embed_tokens.weight.dtype

    def built(layers: int, width: int, heads: int) -> torch.nn.Module:
        torch.manual_seed(0)
        text = {
            "context_length": 76,
            "vocab_size": v.text_size + 2,
            "width": width,
            "heads": heads,
            "layers": layers,
        }
        return (
            CoCa(
                embed_dim=width,
                multimodal_cfg={
                    **text,
                    "mlp_ratio": 4,
                    "dim_head": width // heads,
                    "n_queries": 64,
                    "attn_pooler_heads": heads,
                },
                text_cfg={**text, "embed_cls": True, "output_tokens": True},
                vision_cfg={
                    "image_size": size,
                    "layers": layers,
                    "width": width,
                    "head_width": width // heads,
                    "patch_size": 8,
                    "output_tokens": True,
                    "attentional_pool": True,
                    "attn_pooler_heads": heads,
                },
            )
            .to(dtype)
            .eval()
        )

    peers = {"coca, 12 layers each": built(12, 112, 2), "coca, 2 layers each": built(2, 256, 4)}

    @torch.inference_mode()
    def theirs(peer: Any, images: torch.Tensor, tokens: int) -> torch.Tensor:
        latent, embedded = peer._encode_image(images.to(dtype))
        out = torch.full((len(images), 1), v.text_size)
        for _ in range(tokens):
            scores = peer(
                images, out, image_latent=latent, image_embs=embedded, output_labels=False
            )
            out = torch.cat([out, scores["logits"][:, -1:].argmax(-1)], dim=1)
        return out

    def ours(images: torch.Tensor) -> list[str]:
        return caption_codes(compiled, encode_images(compiled, images), GREEDY)

    shapes = {
        "ours": [model.network, model.image_tokenizer],
        **{shape: [peer] for shape, peer in peers.items()},
    }
    results: dict[str, Any] = {
        "parameters": {
            shape: sum(p.numel() for module in modules for p in module.parameters())
            for shape, modules in shapes.items()
        },
        "tokens": {"each": lengths[:FEW], f"longest of {BATCH}": max(lengths)},
    }
    one_by_one = {
        "ours": lambda: [ours(pixels[n : n + 1]) for n in range(FEW)],
    }
    together = {"ours": lambda: ours(pixels)}
    for shape, peer in peers.items():
        one_by_one[shape] = lambda peer=peer: [
            theirs(peer, pixels[n : n + 1], lengths[n]) for n in range(FEW)
        ]
        together[shape] = lambda peer=peer: theirs(peer, pixels, max(lengths))
    results["batch 1"] = speeds(one_by_one, rounds, FEW)
    results[f"batch {BATCH}"] = speeds(together, rounds, BATCH)
    return results


def drawing(model: Model, compiled: Model, rounds: int) -> Any:
    results: dict[str, Any] = {}
    text = "a red circle and a blue square"
    for batch in (1, 2, 4, 8, 32):
        texts = [text] * batch
        work: dict[str, Callable[[], object]] = {
            way + form: partial(draw_codes, drawer, texts, DrawOptions(method=method, steps=8))
            for form, drawer in (("", model), (", compiled", compiled))
            for way, method in METHODS.items()
        }
        results[f"batch {batch}"] = speeds(work, rounds, batch)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="starter")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parts = ("captions", "coca", "drawing")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    arguments = parser.parse_args()
    keep_freed_memory()
    model, compiled = (
        load(arguments.model, dtype=getattr(torch, arguments.dtype)) for _ in range(2)
    )
    compiled.compile_decoding()
    rng = random.Random("generate")
    pixels = read_images(model, [render(sample_scene(rng)) for _ in range(MANY)])
    codes = encode_images(model, pixels)
    prompts = [describe_prompt(model.vocabulary, row) for row in codes.tolist()]
    figures: dict[str, Any] = {}
    if "captions" in arguments.only:
        figures["captions"] = captions(model, compiled, arguments.model, prompts, arguments.rounds)
    if "coca" in arguments.only:
        outputs = generate_ids(model, prompts[:BATCH], GREEDY)
        lengths = [len(text) + 1 for text in outputs]
        figures["coca"] = coca(model, compiled, pixels[:BATCH], lengths, arguments.rounds)
    if "drawing" in arguments.only:
        figures["drawing"] = drawing(model, compiled, arguments.rounds)
    about = {
        "model": model.fingerprint,
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({**figures, **about}))


if __name__ == "__main__":
    main()
