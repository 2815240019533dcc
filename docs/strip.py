"""Make docs/strip.png, the results of the bundled starter at the top of README.

    python docs/strip.py [MODEL] [OUT]

Six panels: photos that come with scikit-image and their captions, a question about a new scene, a
text and its drawing, a picture and its edit. Nothing is chosen: the seeds are fixed.
"""

import random
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import multimodal
from multimodal.eval.demo import photo
from multimodal.scenes.questions import draw_questions
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene

SIDE, GAP, TEXT = 208, 12, 66
DRAWN = "a large red circle and a large blue square on a white background"


def panel(picture: Image.Image, title: str, text: str) -> Image.Image:
    """A picture with a title above and a text below."""
    image = Image.new("RGB", (SIDE, SIDE + TEXT + 20), "white")
    pen = ImageDraw.Draw(image)
    pen.text((0, 2), title, "#666666", ImageFont.load_default(12))
    image.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (0, 20))
    for number, line in enumerate(textwrap.wrap(text, 34)[:4]):
        pen.text((0, SIDE + 24 + 15 * number), line, "black", ImageFont.load_default(12))
    return image


def main() -> None:
    source, out = (sys.argv[1:] + ["starter", "docs/strip.png"][len(sys.argv) - 1 :])[:2]
    model = multimodal.load(source)
    rng = random.Random("strip")
    scene = sample_scene(rng)
    (question,) = draw_questions(scene, rng, 1)
    picture = render(scene, 128)
    mask = Image.new("L", picture.size)
    mask.paste(255, (64, 0, 128, 64))
    answer = f"{question.usual} {model.answer(picture, question.usual)}"
    photos = [photo("chelsea"), photo("rocket")]
    panels = [
        *(panel(p, "a photo, its caption", model.caption(p)) for p in photos),
        panel(picture, "a question, its answer", answer),
        panel(model.draw(DRAWN, seed=0)[0], "a text, its drawing", DRAWN),
        panel(picture, "before an edit", "the upper right is to be a green star"),
        panel(model.edit(picture, mask, "a green star", seed=0), "after it", "the rest is kept"),
    ]
    width, height = panels[0].size
    strip = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), "white")
    for number, part in enumerate(panels):
        strip.paste(part, (number * (width + GAP), 0))
    strip.save(out, optimize=True)
    print(Path(out))


if __name__ == "__main__":
    main()
