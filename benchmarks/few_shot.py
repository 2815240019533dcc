"""Do examples in the prompt help? Captions in a style that no model was trained on.

    python benchmarks/few_shot.py --data data/flickr8k-codes --model runs/smollm2-reward/model
        [--steps 60] [--pictures photos|scenes|paper|chalk] [--count 200] [--out runs/few-shot]
        [-- --KEY VALUE ...]

Trains an adapter by the recipe few_shot.yaml (what follows ``--`` goes to it; a run that is done is
not done again, and one of other arguments needs another --out), and compares the model with it and
without it. Both caption the same new pictures after 0, 1, 2 and 4 examples, greedy, in bfloat16.
The pictures are photos of val, or scenes of a seed of their own: rendered as in the training data,
cut out of paper, or drawn with chalk. Their captions are lists such as "list of 2 : dog ; ball ;
end" and "list of 2 : circle red ; square blue ; end". They follow no rule by which the training
rewrites captions. The objects of a photo are those that its captions name.

Printed is CIDEr with 95 % intervals over pictures (bootstrap), and for each number of examples the
difference to none, of the same pictures. A list has one reference, and few words: CIDEr is high
where the style is right, and near 0 elsewhere. So the same texts are scored for other pictures, too
(shuffled): that is what the style alone brings. The last line is JSON.
"""

import argparse
import io
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from adapters import fit_once
from fine_tuning import SIDE, STYLES
from PIL import Image

from multimodal import load
from multimodal.api import Model
from multimodal.data.objects import named_objects
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, interval
from multimodal.eval.tasks.few_shot import SHOTS, FewShot
from multimodal.model.lessons import descriptions_of
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import Scene, sample_scene


def rendered(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as in the training data."""
    return render(scene, SIDE)


SCENES = {"scenes": rendered, **STYLES}


def listed(names: list[str]) -> str:
    """Such as "list of 2 : dog ; ball ; end"."""
    return " ; ".join([f"list of {len(names)} : {names[0]}", *names[1:], "end"])


def listed_scene(scene: Scene) -> str:
    """Its objects from left to right."""
    objects = sorted(scene.objects, key=lambda item: item.x)
    return listed([f"{item.shape} {item.colour}" for item in objects])


def new_scenes(pictures: str, count: int) -> Iterator[Sample]:
    """Scenes with one caption each. Same arguments, same samples."""
    rng = random.Random(f"few-shot/{pictures}")
    for number in range(count):
        scene, file = sample_scene(rng), io.BytesIO()
        SCENES[pictures](scene, rng).save(file, "png")
        record = json.dumps({"captions": [listed_scene(scene)]}).encode()
        yield Sample(f"{number:04d}", {"png": file.getvalue(), "json": record})


def new_photos(data: str) -> Iterator[Sample]:
    """Photos of val whose captions name an object, with a list of these in their place."""
    for sample in Shards(data, "val"):
        if names := sorted(named_objects(" ".join(descriptions_of(sample.record)))):
            record = json.dumps({"captions": [listed(names)]}).encode()
            yield Sample(sample.key, {**sample.members, "json": record})


def scores(model: Model, samples: list[Sample]) -> dict[str, Any]:
    """CIDEr after each number of examples, and what the examples add: (mean, low, high)."""
    values: dict[str, Any] = dict(FewShot().measure(Subject(model, samples)))
    measured = [shots for shots in SHOTS if f"CIDEr_{shots}" in values]  # what the model can read
    rows = {f"{shots} shots": values[f"CIDEr_{shots}"] for shots in measured}
    rows |= {f"{shots} shuffled": values[f"CIDEr_{shots}_shuffled"] for shots in measured}
    for shots in measured[1:]:
        pairs = zip(rows[f"{shots} shots"], rows["0 shots"], strict=True)
        rows[f"{shots} - 0"] = [after - before for after, before in pairs]
    return {name: (sum(each) / len(each), *interval(each)) for name, each in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="shard folders to train on")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pictures", choices=("photos", *SCENES), default="photos")
    parser.add_argument("--count", type=int, default=200, help="new pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/few-shot"))
    parser.add_argument("more", nargs="*", metavar="--KEY VALUE", help="after --, of fit")
    options = parser.parse_args()
    fit = ["--config", "few_shot.yaml", "--init_from", options.model]
    fit += ["--data.folders", f"[{', '.join(options.data)}]"]
    parts = ("text_tokenizer", "image_tokenizer", "size")
    fit += [f"--model.{part}={options.model}" for part in parts]
    fit += ["--trainer.max_steps", str(options.steps), *options.more]
    seconds, adapter = fit_once(options.out, *fit), options.out / "adapter"
    of_photos = options.pictures == "photos"
    made = new_photos(options.data[0]) if of_photos else new_scenes(options.pictures, options.count)
    samples = list(islice(made, options.count))
    table = {
        name: scores(load(options.model, dtype="bfloat16", adapter=given), samples)
        for name, given in (("before", None), ("trained", adapter))
    }
    print(f"{'CIDEr':<10}" + "".join(f"{name:>28}" for name in table))
    for row in table["before"]:
        cells = [table[name][row] for name in table]
        texts = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in cells]
        print(f"{row:<10}" + "".join(f"{text:>28}" for text in texts))
    settings = {"pictures": options.pictures, "count": options.count, "steps": options.steps}
    print(json.dumps({**settings, "data": options.data, "seconds": round(seconds), **table}))


if __name__ == "__main__":
    main()
