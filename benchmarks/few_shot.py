"""Do examples in the prompt help? Captions in a style that no model was trained on.

    python benchmarks/few_shot.py --data data/flickr8k data/scenes [--model starter] [--steps 600]
        [--pictures scenes|paper|chalk] [--count 200] [--out runs/few-shot] [-- --KEY VALUE ...]

Trains the model by the recipe few_shot.yaml (what follows ``--`` goes to it; a run that is done is
not done again, and one of other arguments needs another --out), and compares it with the model
before. Both caption the same new pictures after 0, 1, 2 and 4 examples, greedy. The pictures are
scenes of a seed of their own: rendered as in the training data, cut out of paper, or drawn with
chalk. Their captions are lists such as "list of 2 : circle red ; square blue ; end". They follow no
rule by which the training rewrites captions.

Printed is CIDEr with 95 % intervals over pictures (bootstrap), and for each number of examples the
difference to none, of the same pictures. The last line is JSON. How long it takes was not measured.
"""

import argparse
import io
import json
import random
from pathlib import Path
from typing import Any

from adapters import fit_once
from fine_tuning import SIDE, STYLES
from PIL import Image

from multimodal import load
from multimodal.data.samples import Sample
from multimodal.eval.evaluator import Subject, interval
from multimodal.eval.tasks.few_shot import SHOTS, FewShot
from multimodal.scenes.rendering import render
from multimodal.scenes.scene import Scene, sample_scene


def rendered(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as in the training data."""
    return render(scene, SIDE)


PICTURES = {"scenes": rendered, **STYLES}


def listed(scene: Scene) -> str:
    """Such as "list of 2 : circle red ; square blue ; end", from left to right."""
    objects = sorted(scene.objects, key=lambda item: item.x)
    names = [f"{item.shape} {item.colour}" for item in objects]
    return " ; ".join([f"list of {len(names)} : {names[0]}", *names[1:], "end"])


def new_samples(pictures: str, count: int) -> list[Sample]:
    """Pictures with one caption each. Same arguments, same samples."""
    rng, samples = random.Random(f"few-shot/{pictures}"), []
    for number in range(count):
        scene, file = sample_scene(rng), io.BytesIO()
        PICTURES[pictures](scene, rng).save(file, "png")
        record = json.dumps({"captions": [listed(scene)]}).encode()
        samples.append(Sample(f"{number:04d}", {"png": file.getvalue(), "json": record}))
    return samples


def scores(model: str, samples: list[Sample]) -> dict[str, Any]:
    """CIDEr after each number of examples, and what the examples add: (mean, low, high)."""
    values: dict[str, Any] = dict(FewShot().measure(Subject(load(model), samples)))
    measured = [shots for shots in SHOTS if f"CIDEr_{shots}" in values]  # what the model can read
    rows = {f"{shots} shots": values[f"CIDEr_{shots}"] for shots in measured}
    for shots in measured[1:]:
        pairs = zip(rows[f"{shots} shots"], rows["0 shots"], strict=True)
        rows[f"{shots} - 0"] = [after - before for after, before in pairs]
    return {name: (sum(each) / len(each), *interval(each)) for name, each in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="shard folders to train on")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pictures", choices=PICTURES, default="scenes")
    parser.add_argument("--count", type=int, default=200, help="new pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/few-shot"))
    parser.add_argument("more", nargs="*", metavar="--KEY VALUE", help="after --, of fit")
    options = parser.parse_args()
    fit = ["--config", "few_shot.yaml", "--init_from", options.model]
    fit += ["--data.folders", f"[{', '.join(options.data)}]"]
    fit += [f"--model.{part}_tokenizer={options.model}" for part in ("text", "image")]
    fit += ["--trainer.max_steps", str(options.steps), *options.more]
    seconds, trained = fit_once(options.out, *fit), options.out / "model"
    samples = new_samples(options.pictures, options.count)
    table = {"before": scores(options.model, samples), "trained": scores(str(trained), samples)}
    print(f"{'CIDEr':<10}" + "".join(f"{name:>28}" for name in table))
    for row in table["before"]:
        cells = [table[name][row] for name in table]
        texts = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in cells]
        print(f"{row:<10}" + "".join(f"{text:>28}" for text in texts))
    settings = {"pictures": options.pictures, "count": options.count, "steps": options.steps}
    print(json.dumps({**settings, "data": options.data, "seconds": round(seconds), **table}))


if __name__ == "__main__":
    main()
