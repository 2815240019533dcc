"""The demo: a page that shows what a model can do, on pictures that need no download.

Scenes are rendered here, so a program checks the results on them. Photos come with scikit-image.
The pictures are the same for every model. Wrong results are shown too.
"""

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from multimodal.commands.options import add_seed, check_output, load_model, make_parser
from multimodal.data.images import open_image
from multimodal.eval.metrics.scene_drawings import named_objects, score_scene_drawings
from multimodal.eval.page import Figure, Section, page
from multimodal.files import atomic_file
from multimodal.scenes.checking import check_caption
from multimodal.scenes.questions import draw_questions
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import sample_scene

if TYPE_CHECKING:
    from multimodal.api import Model

EPILOG = """The page needs no network and no other file. The first run with a model takes longest.

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
DRAWINGS_PER_PROMPT = 4
GALLERY = 60  # scenes to search, together with the photos


class Demo:
    """The steps of the demo. Each one returns a section of the page."""

    def __init__(self, model: "Model", seed: int = 0) -> None:
        rng = random.Random(f"demo/{seed}")
        self.model, self.seed, self.rng = model, seed, rng
        self.scenes = [sample_scene(rng) for _ in range(GALLERY)]
        self.pictures = [render(scene, 128) for scene in self.scenes]
        self.photos = [photo(name) for name in PHOTOS]

    @property
    def steps(self) -> dict[str, Callable[[], Section]]:
        draws = {
            "image codes": self.reconstructions,
            "drawings": self.drawings,
            "an edit": self.edit,
        }
        return {
            "captions": self.captions,
            "answers": self.answers,
            **(draws if self.model.image_tokenizer.can_draw else {}),
            "search": self.search,
        }

    def captions(self) -> Section:
        section = Section(
            "Captions",
            "Greedy. A program checks every statement about a scene against its ground truth.",
        )
        count, true, claims = 8, 0, 0
        images = self.pictures[:count] + self.photos
        texts = self.model.caption(images)
        figures = []
        for picture, scene, text in zip(self.pictures, self.scenes, texts[:count], strict=False):
            results = [holds for _, holds in check_caption(text, scene).results]
            true, claims = true + sum(results), claims + len(results)
            figures.append(Figure(picture, text, all(results)))
        section.rows.append((f"New scenes: {true} of {claims} statements are true", figures))
        photos = [Figure(*pair) for pair in zip(self.photos, texts[count:], strict=True)]
        section.rows.append(("Photos, different from the training photos", photos))
        return section

    def answers(self) -> Section:
        about = "Questions about new scenes, each with one right answer."
        section = Section("Answers", about)
        right, figures = 0, []
        for picture, scene in list(zip(self.pictures, self.scenes, strict=True))[8:16]:
            (question,) = draw_questions(scene, self.rng, 1)
            answer = self.model.answer(picture, question.usual)
            correct = answer == question.answer
            right += correct
            more = "" if correct else f" (right: {question.answer})"
            figures.append(Figure(picture, f"{question.usual} {answer}{more}", correct))
        section.rows.append((f"{right} of {len(figures)} are right", figures))
        return section

    def reconstructions(self) -> Section:
        from multimodal.data.images import to_image
        from multimodal.inference.codec import decode_images, encode_images, read_images

        levels = " and ".join(
            f"{level.codes} codes of {level.name} ({level.codebook_size:,} at each place)"
            for level in self.model.config.layout.levels
        )
        section = Section(
            "What the model sees",
            f"An image becomes {levels}. Below are the pictures decoded from the codes. "
            "The model cannot see details that are lost here.",
        )
        images = self.pictures[:4] + self.photos[:4]
        codes = encode_images(self.model, read_images(self.model, images))
        decoded = [to_image(image) for image in decode_images(self.model, codes)]
        section.rows.append(("Before", [Figure(image) for image in images]))
        section.rows.append(("After", [Figure(image) for image in decoded]))
        return section

    def drawings(self) -> Section:
        about = f"The first {DRAWINGS_PER_PROMPT} drawings after each text, without selection."
        section = Section("Drawings", about)
        for prompt in PROMPTS:
            images = self.model.draw(prompt, DRAWINGS_PER_PROMPT, seed=self.seed)
            line = prompt
            if named_objects(prompt):
                score = score_scene_drawings([prompt] * len(images), images)
                count = round(score["objects"] * score["n"])
                line += f": {count} of {score['n']:.0f} objects have the right colour and shape"
            section.rows.append((line, [Figure(image) for image in images]))
        return section

    def edit(self) -> Section:
        prompt = "a large blue circle"
        section = Section("An edit", "The white part is redrawn. The rest keeps its pixels.")
        image, box = self.pictures[0], (64, 0, 128, 128)
        mask = Image.new("L", image.size)
        mask.paste(255, box)
        after = self.model.edit(image, box, prompt, seed=self.seed)
        figures = [Figure(image, "before"), Figure(mask, "mask"), Figure(after, "after")]
        section.rows.append((prompt, figures))
        return section

    def search(self) -> Section:
        images = self.pictures + self.photos
        section = Section("Search", f"The five best matches of {len(images)} pictures.")
        rows = self.model.embed(images=images)
        target = self.scenes[20].objects[0]
        query = f"a {target.size} {target.colour} {target.shape}"
        for text in (query, "two blue squares", "a cat", "a person"):
            scores = rows @ self.model.embed(texts=[text])[0]
            best = scores.topk(5)
            figures = [
                Figure(images[i], f"{score:.2f}", self._matches(i, text))
                for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            section.rows.append((text, figures))
        return section

    def _matches(self, number: int, text: str) -> bool | None:
        """Whether the text is true of the picture with this number. None: no program can tell."""
        if not named_objects(text):
            return None
        if number >= len(self.scenes):
            return False
        return check_caption(text, self.scenes[number]).precision == 1


def photo(name: str) -> Image.Image:
    """A photo of scikit-image's wheel, RGB.

    Raises:
        ValueError: if this release has no such photo.
    """
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
    options = make_parser(
        "demo", "Caption, answer, draw, edit and search. Writes one HTML page.", EPILOG
    )
    options.add_argument(
        "--out", type=Path, default=Path("demo.html"), metavar="FILE", help="(default demo.html)"
    )
    add_seed(options)
    arguments = options.parse_args(argv)
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
        if bar.disable:  # no terminal: a line for each step instead of a bar
            print(f"{name}: {sections[-1].seconds:.1f} s", file=sys.stderr)
    seconds = time.perf_counter() - start
    sizes = sum(p.numel() for p in model.network.parameters()) / 1e6
    about = (
        f"{arguments.model}: {sizes:.1f} million parameters, fingerprint {model.fingerprint}. "
        f"Seed {arguments.seed}, {seconds:.0f} seconds with loading, on {arguments.device}. "
        "The model card describes the training data and the quality."
    )
    with atomic_file(arguments.out) as part:
        part.write_text(page("multimodal: a demo", about, sections), "utf-8")
    print(arguments.out)
    return 0
