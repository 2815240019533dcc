"""The guarantees of generation, checked on a trained model: its outputs, not its speed.

    python benchmarks/generation_checks.py [--model starter] [--images 10000]

text: 100 prompts in fp32, the codes of a scene, half of them followed by a question. Greedy texts
    are compared with transformers' ``generate`` with the exported weights. Texts one at a time are
    compared with all at once, and with batches of 16 that others join, also at temperature 1.
images: drawn at temperature 1.3, four fifths code by code. Counts ids out of range and wrong
    lengths.
schema: counts how many of 200 answers at temperature 1 follow a JSON schema.

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
from multimodal.export.hf import export_hf
from multimodal.inference.codec import encode_images, read_images
from multimodal.inference.drawing import draw_codes
from multimodal.inference.json_schema import Schema
from multimodal.inference.text import answer_codes, generate_ids
from multimodal.memory import keep_freed_memory
from multimodal.model.sequences import describe_prompt
from multimodal.options import AnswerOptions, DrawOptions, Method, TextOptions
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
    """The text that transformers generates after each prompt, one at a time. name: of the model."""
    with tempfile.TemporaryDirectory() as folder:
        export_hf(name, Path(folder) / "hf")
        peer = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf")
    peer, generated = peer.float().eval(), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad,
        )
        text = row[0, len(prompt) :].tolist()
        generated.append(text[: text.index(eos)] if eos in text else text)
    return generated


def texts(model: Model, name: str, codes: Tensor) -> dict[str, int]:
    """codes: int64[PROMPTS, n] -> how many texts are equal."""
    v = model.vocabulary
    prompts = [describe_prompt(v, row) for row in codes.tolist()]
    for number in range(PROMPTS // 2):
        question = model.config.templates.ask(QUESTIONS[number % len(QUESTIONS)])
        prompts[number] += model.text_tokenizer.encode(question)
    equal = {}
    settings = {
        "greedy": TextOptions(max_tokens=TOKENS),
        "sampled": TextOptions(max_tokens=TOKENS, temperature=1.0, seed=3),
    }
    for how, options in settings.items():
        alone = [
            generate_ids(model, [prompt], options, [number])[0]
            for number, prompt in enumerate(prompts)
        ]
        others = {"all at once": 0, "filled again": 16}
        for what, size in others.items():
            generated = generate_ids(model, prompts, options, batch_size=size)
            equal[f"{how}, {what}"] = sum(a == b for a, b in zip(alone, generated, strict=True))
        if how == "greedy":
            generated = of_transformers(name, prompts, v.eos, v.pad)
            equal["greedy, transformers"] = sum(
                a == b for a, b in zip(alone, generated, strict=True)
            )
    return equal


def images(model: Model, count: int) -> dict[str, int]:
    n, wrong, different = model.codes_per_image, 0, set()
    shares: dict[Method, int] = {"causal": count * 4 // 5, "masked": count - count * 4 // 5}
    for method, number_of_texts in shares.items():
        prompts = [TEXTS[number % len(TEXTS)] for number in range(number_of_texts)]
        scale = 1.0 if method == "causal" else 3.0
        options = DrawOptions(method=method, steps=8, guidance_scale=scale, temperature=1.3, seed=1)
        codes = draw_codes(model, prompts, options)
        wrong += sum(
            len(row) != n or min(row) < 0 or max(row) >= model.image_tokenizer.codebook_size
            for row in codes.tolist()
        )
        different |= {tuple(row) for row in codes.tolist()}
    return {"images": count, "wrong": wrong, "different": len(different)}


def answers(model: Model, codes: Tensor) -> int:
    """codes: int64[PROMPTS, n] -> how many of 2 PROMPTS answers follow SCHEMA."""
    right = 0
    for seed in range(2):
        options = AnswerOptions(max_tokens=100, temperature=1.0, seed=seed)
        questions = ["what is there?"] * PROMPTS
        for text in answer_codes(model, codes, questions, options, schema=Schema(model, SCHEMA)):
            answer = json.loads(text)
            right += (
                answer.keys() == SCHEMA["properties"].keys()
                and answer["colour"] in COLOURS
                and type(answer["count"]) is int
                and 0 <= answer["count"] <= MOST
                and isinstance(answer["words"], str)
                and len(answer["words"]) <= LONGEST
            )
    return right


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="starter")
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    keep_freed_memory()
    model, rng = load(arguments.model), random.Random(5)
    scenes = [render(sample_scene(rng)) for _ in range(PROMPTS)]
    codes = encode_images(model, read_images(model, scenes))
    figures: dict[str, Any] = {f"equal of {PROMPTS}": texts(model, arguments.model, codes)}
    print(json.dumps(figures), flush=True)
    figures["schema"] = answers(model, codes)
    figures["drawn"] = images(model, arguments.images)
    print(json.dumps({**figures, "model": model.fingerprint}))


if __name__ == "__main__":
    main()
