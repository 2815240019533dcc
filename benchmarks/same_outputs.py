"""Proof of a refactoring: what the starter writes and draws, and what ten training steps log.

Run it at two commits, on one machine. If behaviour did not change, the two JSON objects are equal
to the byte. Only the public interface is used, so that the script survives changes of the code.
Everything is in fp32 and on one thread.

    python benchmarks/same_outputs.py > before.json      (4 minutes on 2 cores)
"""

import hashlib
import json
import math
import random
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import skimage.data
import torch
import yaml
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import multimodal
from multimodal.cli import main

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
PROMPTS = (
    "a red circle and a blue square",
    "two yellow stars on a black background",
    "a brown dog runs on the grass",
)
QUESTIONS = ("How many circles are there?", "What color is the square?", "Is there a dog?")


def pictures(count: int) -> list[Image.Image]:
    """Drawings of circles and squares, and then photos."""
    rng = random.Random("same outputs")
    images = []
    for _ in range(count):
        image = Image.new("RGB", (96, 96), rng.choice(COLOURS))
        pen = ImageDraw.Draw(image)
        for _ in range(rng.randint(1, 4)):
            x, y, size = rng.randint(0, 70), rng.randint(0, 70), rng.randint(8, 40)
            shape = rng.choice((pen.ellipse, pen.rectangle))
            shape((x, y, x + size, y + size), fill=rng.choice(COLOURS))
        images.append(image)
    return images + [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS]


def digest(images: list[Image.Image]) -> str:
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:16]


def rows_digest(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]


def use() -> dict[str, Any]:
    """Texts, and hashes of the bytes of images and embeddings."""
    model = multimodal.load("starter")
    images = pictures(20)
    photo, kind = images[-1], {"type": "string", "maxLength": 8}
    schema = {
        "type": "object",
        "properties": {"shape": kind},
        "required": ["shape"],
        "additionalProperties": False,
    }
    causal = [image for text in PROMPTS for image in model.draw(text, n=2, seed=3)]
    masked = [image for text in PROMPTS for image in model.draw(text, n=2, seed=3, method="masked")]
    guided = model.draw(PROMPTS[0], n=2, guidance_schedule="rising", negative="a green star")
    best = model.draw(PROMPTS[0], candidates=3, seed=1)
    mixed = [
        model.generate([image, " and "], output="any", max_tokens=24, temperature=1.0, seed=number)
        for number, image in enumerate(images[:3])
    ]
    replies = model.reply(
        [[image, question] for image in images[:6] for question in QUESTIONS],
        temperature=0.7,
        seed=5,
        stop=["."],
    )
    return {
        "fingerprint": model.fingerprint,
        "image tokenizer": model.image_tokenizer.fingerprint,
        "captions": model.caption(images),
        "captions in batches of 7": model.caption(images, batch_size=7),
        "captions sampled": model.caption(images, temperature=1.0, top_p=0.9, top_k=50, seed=2),
        "captions with beams": model.caption(images, beams=5),
        "captions with a penalty": model.caption(images, repetition_penalty=1.3),
        "captions, best of four": model.caption(images[:6], candidates=4, temperature=1.0),
        "captions, few-shot": model.caption(images[:6], examples=[(images[7], "a picture")]),
        "answers": [
            model.answer(image, question) for image in images[:8] for question in QUESTIONS
        ],
        "choices": [
            model.answer(image, QUESTIONS[1], choices=list(COLOURS)) for image in images[:8]
        ],
        "json": [model.answer(image, QUESTIONS[0], schema=schema) for image in images[:8]],
        "drawn": [digest([image]) for image in causal],
        "masked": [digest([image]) for image in masked],
        "guided": digest(guided),
        "best of three": digest(best),
        "edit": digest([model.edit(images[0], (8, 8, 40, 60), "a red circle")]),
        "outpaint": digest([model.outpaint(images[1], (0, 0, 32, 0), "a blue square")]),
        "vary": digest([model.vary(photo, 0.4)]),
        "embedded images": rows_digest(model.embed(images=images)),
        "embedded texts": rows_digest(model.embed(texts=list(PROMPTS))),
        "mixed": [
            [part if isinstance(part, str) else digest([part]) for part in parts] for parts in mixed
        ],
        "replies": [
            (reply.parts, reply.text_tokens, reply.ended, reply.log_probability)
            for reply in replies
        ],
        "streamed": [
            part if isinstance(part, str) else digest([part])
            for part in model.stream([images[2], "This is"], max_tokens=20)
        ],
    }


def curves(folder: Path) -> dict[str, list[float]]:
    """The values that a run logged, by name, without those that depend on the clock."""
    (events,) = {path.parent for path in folder.rglob("events.out.tfevents*")}
    log = EventAccumulator(str(events)).Reload()
    return {
        name: [event.value for event in log.Scalars(name)]
        for name in sorted(log.Tags()["scalars"])
        if name.startswith(("train/", "val/")) and "second" not in name
    }


def training() -> dict[str, Any]:
    """Ten steps of an image tokenizer, and ten of a joint model on its codes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes, text = str(folder / "scenes"), str(folder / "text.json")
        autoencoder = {"name": "vit", "dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2}
        tokenizer = {
            "image_size": 32,
            "downsample": 8,
            "autoencoder": autoencoder,
            "quantizer": {"name": "fsq", "levels": [5, 5]},
        }
        joint = {
            "text_tokenizer": text,
            "image_tokenizer": str(folder / "tokenizer/model"),
            "size": "tiny",
            "row_length": 192,
            "warmup_steps": 2,
        }
        trainer = {
            "max_steps": 10,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
        }
        module = "multimodal.train.tokenizers.detail.DetailModule"
        runs = {
            "tokenizer": (module, {"tokenizer": tokenizer, "warmup_steps": 2}),
            "joint": ("multimodal.train.joint.JointModule", joint),
        }
        verbs = [
            ["data", "scenes", scenes, "--count", "60", "--size", "32"],
            ["tokenizer", "text", scenes, "--out", text, "--vocabulary-size", "320"],
        ]
        for run, (path, arguments) in runs.items():
            config = folder / f"{run}.yaml"
            config.write_text(
                yaml.safe_dump(
                    {
                        "output": str(folder / run),
                        "seed_everything": 0,
                        "model": {"class_path": path, "init_args": arguments},
                        "data": {
                            "folders": [scenes],
                            "global_batch_size": 8,
                            "workers": 0,
                            "val_limit": 8,
                        },
                        "trainer": trainer,
                    }
                ),
                "utf-8",
            )
            verbs.append(["fit", "--config", str(config)])
        for verb in verbs:
            with redirect_stdout(sys.stderr):
                if main(verb):
                    raise SystemExit(f"{verb[0]} failed")
        models = {
            run: multimodal.load(folder / run / "model").fingerprint
            for run in runs
            if (folder / run / "model" / "heads.safetensors").exists()
        }
        return {"fingerprints": models, **{run: curves(folder / run) for run in runs}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    outputs = {"starter": use(), "training": training()}
    flat = [
        value
        for run in ("tokenizer", "joint")
        for curve in outputs["training"][run].values()
        for value in curve
    ]
    assert flat and all(map(math.isfinite, flat))
    print(json.dumps(outputs, indent=1))
