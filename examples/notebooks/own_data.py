# %% [markdown]
# # Fine-tuning on a small data set of your own
#
# Pictures with captions become shards, the starter learns from them, and pictures that were held
# out say whether it did. The data are flags of three stripes, which the starter never saw. Replace
# the first cell by yours: a folder with a `.txt` beside each image does as well (`SOURCE = "dir"`).
#
# A run has a folder, `runs/flags`. `curves.py` shows its losses.

# %% The data: (image, captions), with names that tell training from test
import random

from PIL import Image, ImageDraw

PICTURES, STEPS, BATCH = 240, 120, 16  # minutes on two CPU cores
COLOURS = {
    "red": (205, 30, 45), "white": (250, 250, 250), "blue": (20, 60, 170),
    "green": (10, 135, 70), "yellow": (250, 205, 20), "black": (20, 20, 20),
}  # fmt: skip


def flag(colours: list[str], upright: bool) -> Image.Image:
    image = Image.new("RGB", (96, 96))
    pen = ImageDraw.Draw(image)
    for number, colour in enumerate(colours):
        start, end = 32 * number, 32 * number + 31
        box = (start, 0, end, 95) if upright else (0, start, 95, end)
        pen.rectangle(box, fill=COLOURS[colour])
    return image


def flags(count: int, seed: int) -> list[tuple[Image.Image, list[str]]]:
    rng, made = random.Random(seed), []
    for _ in range(count):
        colours, upright = rng.sample(list(COLOURS), 3), rng.random() < 0.5
        place = "left to right" if upright else "top to bottom"
        made.append((flag(colours, upright), [f"a flag, from {place} {', '.join(colours)}"]))
    return made


SOURCE, TEST = flags(PICTURES, seed=0), flags(60, seed=1)

# %% Shards: every sample is verified, and what is refused is named in rejected.jsonl
import multimodal

report = multimodal.build_shards(SOURCE, "data/flags", val_share=0.1, overwrite=True)
print(report)

# %% What the starter says before
model = multimodal.load("starter")


def right(model: multimodal.Model) -> float:
    """The share of stripes of test pictures whose colour is named in its place."""
    said = model.caption([image for image, _ in TEST])
    right = 0
    for text, (_, (truth,)) in zip(said, TEST, strict=True):
        named, true = (each.replace(",", "").split()[-3:] for each in (text, truth))
        right += sum(a == b for a, b in zip(named, true, strict=False))
    return right / (3 * len(TEST))


before = right(model)
print(before, model.caption(TEST[0][0]))

# %% The training: what `multimodal fit` does on the command line
from multimodal.cli import main

arguments = ["fit", "--config", "finetune.yaml", "--init_from", "starter"]
arguments += ["--output", "runs/flags", "--overwrite", "--data.folders", "[data/flags]"]
arguments += ["--data.global_batch_size", str(BATCH), "--trainer.max_steps", str(STEPS)]
arguments += ["--trainer.val_check_interval", str(STEPS // 4), "--trainer.log_every_n_steps", "5"]
assert main(arguments) == 0

# %% What the model of the best validation says
tuned = multimodal.load("runs/flags/model")
after = right(tuned)
print(f"stripes named rightly: {before:.0%} before, {after:.0%} after")
for image, (text,) in TEST[:3]:
    print(f"{text!r}: {tuned.caption(image)!r}")
