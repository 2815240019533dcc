"""What generation promises, checked on a trained model: no speed, only what comes out.

    python benchmarks/generation_checks.py [--model starter] [--images 10000]

text: greedy, fp32, of 100 prompts (a scene's codes; half go on with a question): equal to
    transformers' ``generate`` with the exported weights; one at a time equal to all at once and to
    batches of 16 whose places are filled again; the same at temperature 1.
images: drawn at temperature 1.3, four fifths code by code: ids out of range, wrong lengths.
schema: 200 answers at temperature 1 that parse and hold to a JSON schema.

The last line is JSON.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from multimodal import load
from multimodal.api import Model
from multimodal.inference.drawing import Method, draw_codes
from multimodal.inference.text import answer_codes, encode_images, generate_ids, read_images
from multimodal.memory import keep_freed_memory
from multimodal.model.export import export_hf
from multimodal.model.sequences import describe_prompt
from multimodal.options import Sampling
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene

PROMPTS, TOKENS = 100, 32
QUESTIONS = ("is there a circle?", "what colour is it?", "how many things are there?")
TEXTS = ("a red circle and a blue square", "a dog runs on the beach", "x", "two green crosses")
COLOURS, MOST, LONGEST = ("red", "green", "blue", "yellow"), 9, 12
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": list(COLOURS)},
        "count": {"type": "integer", "minimum": 0, "maximum": MOST},
        "words": {"type": "string", "maxLength": LONGEST},
    },
    "required": ["colour", "count", "words"],
    "additionalProperties": False,
}


@torch.inference_mode()
def of_transformers(name: str, prompts: list[list[int]], eos: int, pad: int) -> list[list[int]]:
    """name: of the model -> what transformers says after each prompt, alone"""
    with tempfile.TemporaryDirectory() as folder:
        export_hf(name, Path(folder) / "hf")
        peer = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf")
    peer, said = peer.float().eval(), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS,
                            do_sample=False, eos_token_id=eos, pad_token_id=pad)  # fmt: skip
        text = row[0, len(prompt) :].tolist()
        said.append(text[: text.index(eos)] if eos in text else text)
    return said


def texts(model: Model, name: str, codes: Tensor) -> dict[str, int]:
    """codes: int64[PROMPTS, n] -> how many texts are equal"""
    v = model.vocabulary
    prompts = [describe_prompt(v, row) for row in (codes + v.image_start).tolist()]
    for number in range(PROMPTS // 2):
        question = model.config.templates.ask(QUESTIONS[number % len(QUESTIONS)])
        prompts[number] += model.text_tokenizer.encode(question)
    found = {}
    for how, sampling in (("greedy", Sampling()), ("sampled", Sampling(temperature=1.0, seed=3))):
        alone = [
            generate_ids(model, [prompt], TOKENS, sampling, [number])[0]
            for number, prompt in enumerate(prompts)
        ]
        others = {"all at once": 0, "filled again": 16}
        for what, size in others.items():
            said = generate_ids(model, prompts, TOKENS, sampling, batch_size=size)
            found[f"{how}, {what}"] = sum(a == b for a, b in zip(alone, said, strict=True))
        if how == "greedy":
            said = of_transformers(name, prompts, v.eos, v.pad)
            found["greedy, transformers"] = sum(a == b for a, b in zip(alone, said, strict=True))
    return found


def images(model: Model, count: int) -> dict[str, int]:
    n, wrong, made = model.image_tokenizer.config.grid**2, 0, set()
    shares: dict[Method, int] = {"causal": count * 4 // 5, "masked": count - count * 4 // 5}
    for method, many in shares.items():
        asked = [TEXTS[number % len(TEXTS)] for number in range(many)]
        scale = 1.0 if method == "causal" else 3.0
        codes = draw_codes(model, asked, method=method, steps=8, guidance_scale=scale,
                           sampling=Sampling(temperature=1.3, seed=1))  # fmt: skip
        wrong += sum(
            len(row) != n or min(row) < 0 or max(row) >= model.image_tokenizer.codebook_size
            for row in codes.tolist()
        )
        made |= {tuple(row) for row in codes.tolist()}
    return {"images": count, "wrong": wrong, "different": len(made)}


def answers(model: Model, codes: Tensor) -> int:
    """codes: int64[PROMPTS, n] -> how many of twice as many answers hold to SCHEMA"""
    right = 0
    for seed in range(2):
        sampling = Sampling(temperature=1.0, seed=seed)
        for text in answer_codes(model, codes, ["what is there?"] * PROMPTS, 100, sampling,
                                 schema=SCHEMA):  # fmt: skip
            said = json.loads(text)
            right += (
                said.keys() == SCHEMA["properties"].keys()
                and said["colour"] in COLOURS
                and type(said["count"]) is int
                and 0 <= said["count"] <= MOST
                and isinstance(said["words"], str)
                and len(said["words"]) <= LONGEST
            )
    return right


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="starter")
    made.add_argument("--images", type=int, default=10_000)
    arguments = made.parse_args()
    keep_freed_memory()
    model, rng = load(arguments.model), random.Random(5)
    scenes = [render(sample_scene(rng)) for _ in range(PROMPTS)]
    codes = encode_images(model, read_images(model, scenes))
    found: dict[str, Any] = {f"equal of {PROMPTS}": texts(model, arguments.model, codes)}
    print(json.dumps(found), flush=True)
    found["schema"] = answers(model, codes)
    found["drawn"] = images(model, arguments.images)
    print(json.dumps({**found, "model": model.fingerprint}))


if __name__ == "__main__":
    main()
