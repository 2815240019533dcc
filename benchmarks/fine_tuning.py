"""Fine-tuning the starter on 200 images of a style it never saw, and training from random weights.

    python benchmarks/fine_tuning.py [--style paper] [--out runs/fine-tuning] [--steps 300]
        [--model starter]

There are two styles. ``paper``: shapes cut out of paper, a little turned, with shadows on brown
cardboard. ``chalk``: outlines on a dirty green board. The captions say where each object is. The
data are a folder of images with texts beside them, as a user's would be, and the commands are the
README's. 100 other images are captioned (greedy) by the starter, by the fine-tuned model, and by a
model of the same size trained on the same images from random weights, with the starter's
tokenizers. The last line is JSON.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from multimodal import load
from multimodal.cli import main as multimodal
from multimodal.eval.metrics.scene_captions import score_scene_captions
from multimodal.scenes.positions import region_of
from multimodal.scenes.rendering import stencil
from multimodal.scenes.scene import COLOURS, Scene, SceneObject, sample_scene
from multimodal.scenes.words import with_article

TRAIN, TEST, SIDE = 200, 100, 128
BOARD, CARDBOARD = (38, 74, 58), (186, 152, 110)
SCALE = 4  # shapes are drawn larger, then made smaller


def ground(rgb: tuple[int, int, int], deviation: float, noise: np.random.Generator) -> Image.Image:
    """Grain of one colour, SIDE x SIDE pixels."""
    grain = noise.normal(0, deviation, (SIDE // 4, SIDE // 4, 1)).repeat(3, 2)
    board = Image.fromarray((np.array(rgb) + grain).clip(0, 255).astype(np.uint8))
    return board.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def placed(item: SceneObject, shape: Image.Image, shift: int = 0) -> Image.Image:
    """A mask of the shape at the place of the object, SIDE x SIDE. shift: pixels right and down."""
    mask = Image.new("L", (SIDE * SCALE, SIDE * SCALE))
    corner = (
        round(at * SIDE * SCALE) - shape.width // 2 + shift * SCALE for at in (item.x, item.y)
    )
    mask.paste(shape, tuple(corner))
    return mask.reduce(SCALE)


def chalk(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as outlines on a board, SIDE x SIDE pixels."""
    noise = np.random.default_rng(rng.randrange(2**32))
    board = ground(BOARD, 14, noise)
    dust = Image.fromarray((255 * (noise.random((SIDE, SIDE)) < 0.82)).astype(np.uint8))
    for item in scene.objects:
        shape = stencil(item.shape, round(item.radius * SIDE * SCALE)).rotate(rng.uniform(-12, 12))
        line = ImageChops.subtract(shape, shape.filter(ImageFilter.MinFilter(4 * SCALE + 1)))
        light = tuple(round(0.75 * value + 0.25 * 255) for value in COLOURS[item.colour])
        board.paste(light, (0, 0), ImageChops.darker(placed(item, line), dust))
    smear = ImageDraw.Draw(board)
    smear.line([(0, rng.randrange(SIDE)), (SIDE, rng.randrange(SIDE))], fill=(60, 92, 78), width=2)
    return board


def paper(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene cut out of paper, SIDE x SIDE pixels."""
    noise = np.random.default_rng(rng.randrange(2**32))
    board = ground(CARDBOARD, 12, noise)
    for item in scene.objects:
        shape = stencil(item.shape, round(item.radius * SIDE * SCALE)).rotate(rng.uniform(-15, 15))
        shadow = placed(item, shape, shift=4).filter(ImageFilter.GaussianBlur(2))
        board.paste((70, 52, 34), (0, 0), shadow.point(lambda value: value * 0.6))
        faded = tuple(round(0.8 * value + 0.2 * 200) for value in COLOURS[item.colour])
        board.paste(ground(faded, 6, noise), (0, 0), placed(item, shape))
    return board


STYLES = {"paper": paper, "chalk": chalk}


def caption(scene: Scene, rng: random.Random) -> str:
    """Every object with its place, without texture, size or background."""
    parts = []
    for item in rng.sample(scene.objects, len(scene.objects)):
        region = region_of([item])
        where = {
            "centre": "in the centre",
            "left": "on the left",
            "right": "on the right",
            "top": "at the top",
            "bottom": "at the bottom",
            None: "",
        }
        place = where.get(region, f"in the {region}")
        parts.append(f"{with_article(f'{item.colour} {item.shape}')} {place}".strip())
    return ", ".join(parts)


def make(folder: Path, style: str, count: int, seed: int) -> dict[str, Scene]:
    """Write NAME.png and NAME.json with four captions each. Returns the scenes by NAME."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, scenes = random.Random(f"{style}/{seed}"), {}
    for number in range(count):
        scene, name = sample_scene(rng), f"{style}-{seed}-{number:04d}"
        STYLES[style](scene, rng).save(folder / f"{name}.png")
        texts = {"captions": [caption(scene, rng) for _ in range(4)]}
        (folder / f"{name}.json").write_text(json.dumps(texts), "utf-8")
        scenes[name] = scene
    return scenes


def run(*arguments: str) -> None:
    print("$ multimodal", *arguments, file=sys.stderr)
    if status := multimodal([*arguments]):
        sys.exit(status)


def score(model: str, folder: Path, scenes: dict[str, Scene]) -> dict[str, float]:
    captions = load(model).caption([folder / f"{name}.png" for name in scenes])
    for text in captions[:5]:
        print("  ", text, file=sys.stderr)
    figures = score_scene_captions(dict(zip(scenes, captions, strict=True)), scenes)
    return {name: figures[name] for name in ("attribute_precision", "object_recall", "perfect")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--style", choices=STYLES, default="paper")
    parser.add_argument("--out", type=Path, default=Path("runs/fine-tuning"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model", default="starter")
    options = parser.parse_args()
    out: Path = options.out / options.style
    make(out / "pictures", options.style, TRAIN, seed=0)
    truth = make(out / "unseen", options.style, TEST, seed=1)
    if not (out / "data").exists():
        run("data", "build", str(out / "pictures"), str(out / "data"), "--val-share", "0.05")
    fit = ["fit", "--config", "finetune.yaml", "--data.folders", f"[{out / 'data'}]"]
    fit += ["--trainer.max_steps", str(options.steps)]
    for kind in ("text", "image"):
        fit += [f"--model.init_args.{kind}_tokenizer", options.model]
    run(*fit, "--overwrite", "--output", str(out / "tuned"), "--init_from", options.model)
    run(*fit, "--overwrite", "--output", str(out / "from-nothing"))
    models = {
        "starter": options.model,
        "fine-tuned": str(out / "tuned" / "model"),
        "from nothing": str(out / "from-nothing" / "model"),
    }
    figures = {name: score(model, out / "unseen", truth) for name, model in models.items()}
    print(
        json.dumps(
            {
                "style": options.style,
                "pictures": TRAIN,
                "unseen": TEST,
                "steps": options.steps,
                **figures,
            }
        )
    )


if __name__ == "__main__":
    main()
