"""The demo: what a model can do, on pictures that need no download, as one page to look at.

Scenes are rendered here, so what is said of them is checked by program; photos come with
scikit-image. Nothing is picked: the pictures are the same for every model, and what it gets wrong
is shown as it is.
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from multimodal.commands.options import check_output, load_model, parser
from multimodal.data.images import open_image
from multimodal.eval.metrics.scene_drawings import objects_asked, score_scene_drawings
from multimodal.eval.page import Figure, Section, page
from multimodal.files import atomic_file
from multimodal.scenes.claims import check_caption
from multimodal.scenes.questions import questions
from multimodal.scenes.scene import render, sample_scene

if TYPE_CHECKING:
    from multimodal.model.network import Multimodal

EPILOG = """The page needs no network and no other file. The first use of a model takes longest.

examples:
  multimodal demo
  multimodal demo --model runs/scenes-joint/model --out scenes.html
"""

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left")
PROMPTS = (
    "a large red circle and a large blue square on a white background",
    "a large yellow star above a large green heart on a black background",
    "three small purple circles on a sky background",
    "an orange ring on a grey background",
)
DRAWINGS_EACH = 4
GALLERY = 60  # scenes to search, besides the photos


class Demo:
    """The steps of the demo; each makes one section."""

    def __init__(self, model: "Multimodal", seed: int = 0) -> None:
        rng = random.Random(f"demo/{seed}")
        self.model, self.seed, self.rng = model, seed, rng
        self.scenes = [sample_scene(rng) for _ in range(GALLERY)]
        self.pictures = [render(scene, 128) for scene in self.scenes]
        self.photos = [photo(name) for name in PHOTOS]

    @property
    def steps(self) -> dict[str, Callable[[], Section]]:
        return {
            "captions": self.captions,
            "answers": self.answers,
            "image codes": self.reconstructions,
            "drawings": self.drawings,
            "an edit": self.edit,
            "search": self.search,
        }

    def captions(self) -> Section:
        made = Section(
            "Captions",
            "Greedy. Every statement about a scene is checked against its ground truth by program.",
        )
        count, true, claims = 8, 0, 0
        images = self.pictures[:count] + self.photos
        texts = self.model.caption(images)
        figures = []
        for picture, scene, text in zip(self.pictures, self.scenes, texts[:count], strict=False):
            results = [holds for _, holds in check_caption(text, scene).results]
            true, claims = true + sum(results), claims + len(results)
            figures.append(Figure(picture, text, all(results)))
        made.rows.append((f"Scenes it never saw: {true} of {claims} statements are true", figures))
        photos = [Figure(*pair) for pair in zip(self.photos, texts[count:], strict=True)]
        made.rows.append(("Photos, of another kind than it was trained on", photos))
        return made

    def answers(self) -> Section:
        about = "Questions about scenes it never saw, each with one right answer."
        made = Section("Answers", about)
        right, figures = 0, []
        for picture, scene in list(zip(self.pictures, self.scenes, strict=True))[8:16]:
            ((question, expected),) = questions(scene, self.rng, 1)
            found = self.model.answer(picture, question)
            correct = found == expected
            right += correct
            more = "" if correct else f" (right: {expected})"
            figures.append(Figure(picture, f"{question} {found}{more}", correct))
        made.rows.append((f"{right} of {len(figures)} are right", figures))
        return made

    def reconstructions(self) -> Section:
        from multimodal.data.images import to_image
        from multimodal.inference.drawing import decode_images
        from multimodal.inference.text import encode_images, read_images

        config = self.model.image_tokenizer.config
        made = Section(
            "What the model sees",
            f"An image becomes {config.grid} x {config.grid} codes out of "
            f"{self.model.image_tokenizer.codebook_size:,}; below, the pictures decoded from them. "
            "What is lost here it cannot know.",
        )
        images = self.pictures[:4] + self.photos[:4]
        codes = encode_images(self.model, read_images(self.model, images))
        decoded = [to_image(image) for image in decode_images(self.model, codes)]
        made.rows.append(("Before", [Figure(image) for image in images]))
        made.rows.append(("After", [Figure(image) for image in decoded]))
        return made

    def drawings(self) -> Section:
        made = Section("Drawings", f"The first {DRAWINGS_EACH} of each, none picked.")
        for prompt in PROMPTS:
            images = self.model.draw(prompt, DRAWINGS_EACH, seed=self.seed)
            line = prompt
            if objects_asked(prompt):
                score = score_scene_drawings([prompt] * len(images), images)
                share = round(score["objects"] * score["n"])
                line += f": {share} of {score['n']:.0f} objects have the right colour and shape"
            made.rows.append((line, [Figure(image) for image in images]))
        return made

    def edit(self) -> Section:
        prompt = "a large blue circle"
        made = Section("An edit", "The white part is drawn anew; the rest keeps its pixels.")
        image, box = self.pictures[0], (64, 0, 128, 128)
        mask = Image.new("L", image.size)
        mask.paste(255, box)
        after = self.model.edit(image, box, prompt, seed=self.seed)
        figures = [Figure(image, "before"), Figure(mask, "mask"), Figure(after, "after")]
        made.rows.append((prompt, figures))
        return made

    def search(self) -> Section:
        images = self.pictures + self.photos
        made = Section("Search", f"The five of {len(images)} pictures that fit best.")
        rows = self.model.embed(images=images)
        wanted = self.scenes[20].objects[0]
        query = f"a {wanted.size} {wanted.colour} {wanted.shape}"
        for text in (query, "two blue squares", "a cat", "a person"):
            scores = rows @ self.model.embed(texts=[text])[0]
            best = scores.topk(5)
            figures = [
                Figure(images[i], f"{score:.2f}", self._shows(i, text))
                for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            made.rows.append((text, figures))
        return made

    def _shows(self, number: int, text: str) -> bool | None:
        """Whether the picture of this number is a scene of which the text is true; None where a
        program cannot tell."""
        if not objects_asked(text):
            return None
        if number >= len(self.scenes):
            return False
        return check_caption(text, self.scenes[number]).precision == 1


def photo(name: str) -> Image.Image:
    """A photo of those in scikit-image's wheel, RGB. Errors: ``ValueError`` where it has none."""
    from skimage import data

    for suffix in (".png", ".jpg"):
        path = Path(data.__path__[0]) / f"{name}{suffix}"
        if path.is_file():
            return open_image(path)
    raise ValueError(f"scikit-image has no picture {name!r} in this release")


def timed(step: Callable[[], Section]) -> Section:
    start = time.perf_counter()
    section = step()
    section.seconds = time.perf_counter() - start
    return section


def main(argv: list[str]) -> int:
    made = parser("demo", "Caption, answer, draw, edit and search; leaves one HTML page.", EPILOG)
    made.add_argument(
        "--out", type=Path, default=Path("demo.html"), metavar="FILE", help="(default demo.html)"
    )
    arguments = made.parse_args(argv)
    check_output(arguments.out, (".html",))

    from tqdm import tqdm

    start = time.perf_counter()
    model = load_model(arguments)
    demo = Demo(model, arguments.seed)
    sections = []
    bar = tqdm(demo.steps.items(), unit="step", file=sys.stderr, disable=None)
    for name, step in bar:
        bar.set_description(name)
        sections.append(timed(step))
        if bar.disable:  # no terminal: a line each instead of a bar
            print(f"{name}: {sections[-1].seconds:.1f} s", file=sys.stderr)
    seconds = time.perf_counter() - start
    sizes = sum(p.numel() for p in model.parameters()) / 1e6
    about = (
        f"{arguments.model}: {sizes:.1f} million parameters, fingerprint {model.fingerprint}. "
        f"Seed {arguments.seed}; {seconds:.0f} seconds in all, with loading, on "
        f"{arguments.device}. The model card says what it was trained on and how well it does."
    )
    with atomic_file(arguments.out) as part:
        part.write_text(page("multimodal: a demo", about, sections), "utf-8")
    print(arguments.out)
    return 0
