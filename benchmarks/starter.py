"""Every number of the starter's model card, on data it was not trained on.

    python benchmarks/starter.py [--model starter] [--data data] [--threads 2] [--pictures DIR]

Reads the folders flickr8k, easy_vqa and scenes under --data (`multimodal data index`, `data
scenes`): their val splits. Everything is greedy where it is text, and seed 0 where it is drawn;
photos are captioned with 5 beams (length penalty 0.5), too.

- captions: flickr8k, all photos, five references, CIDEr after lower-casing, without punctuation;
- answers: easy_vqa, all questions; exact match; open: those that are not answered by yes or no;
- search: flickr8k, five captions each, recall at 10 in both directions (chance 1 %);
- scenes: 200 captioned, every claim checked, on val and on heldout; all their questions; recall of
  their captions among those 200; drawings after the first caption that names all objects with
  colour and shape: both ways of drawing, the best of so many candidates, and the true pictures
  after encoding and decoding; objects read off the pixels by program.

The last line is a JSON object.
"""

import argparse
import json
import platform
import sys
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from multimodal import load
from multimodal.drawing import decode_images, draw_codes
from multimodal.embedding import embed_codes, embed_texts
from multimodal.eval.answering import score_answers
from multimodal.eval.captioning import normalise, score_captions
from multimodal.eval.drawings import score_scene_drawings, whole_caption
from multimodal.eval.retrieval import score_retrieval
from multimodal.eval.scenes import score_scene_captions
from multimodal.generation import answer_codes, caption_codes, encode_images, read_images
from multimodal.images import grid_of, to_image
from multimodal.model import Multimodal
from multimodal.samples import Sample
from multimodal.sampling import Sampling
from multimodal.scenes import Scene
from multimodal.shards import Shards

BATCH = 64
BEAMS = 5


def batches(samples: list[Sample], name: str) -> "tqdm[list[Sample]]":
    starts = range(0, len(samples), BATCH)
    return tqdm([samples[i : i + BATCH] for i in starts], desc=name, unit="batch", disable=None)


def first(folder: Path, split: str = "val") -> list[Sample]:
    return list(islice(Shards(folder, split), 200))


def codes_of(model: Multimodal, samples: list[Sample]) -> Tensor:
    images, keys = [sample.image for sample in samples], [sample.key for sample in samples]
    return encode_images(model, read_images(model, images, keys))


def photos(model: Multimodal, folder: Path) -> dict[str, float]:
    samples = list(Shards(folder, "val"))
    # Lower case and no punctuation, as the figures before these; COCO's tokens differ little.
    truth = {s.key: [normalise(text) for text in s.record["captions"]] for s in samples}
    figures: dict[str, float] = {"n": len(samples)}
    for name, sampling in (("", Sampling()), (f", {BEAMS} beams", Sampling(beams=BEAMS))):
        said: dict[str, str] = {}
        for batch in batches(samples, f"photos{name}"):
            captions = caption_codes(model, codes_of(model, batch), sampling=sampling)
            said |= zip((s.key for s in batch), map(normalise, captions), strict=True)
        scores = score_captions(said, truth, tokenize=False)
        figures |= {f"CIDEr{name}": scores["CIDEr"], f"Bleu_4{name}": scores["Bleu_4"],
                    f"distinct{name}": len(set(said.values()))}  # fmt: skip
    return {**figures, **search(model, samples)}


def search(model: Multimodal, samples: list[Sample]) -> dict[str, float]:
    images, texts, owners = [], [], []
    for batch in batches(samples, "search"):
        images.append(embed_codes(model, codes_of(model, batch)))
        captions = [str(text) for s in batch for text in s.record["captions"]]
        texts.append(embed_texts(model, captions))
    for number, sample in enumerate(samples):
        owners += [number] * len(sample.record["captions"])
    return score_retrieval(torch.cat(images), torch.cat(texts), owners)


def answers(model: Multimodal, samples: list[Sample]) -> dict[str, float]:
    pairs = []
    for batch in batches(samples, "questions"):
        codes = codes_of(model, batch)
        rows = [n for n, s in enumerate(batch) for _ in s.record["qa"]]
        asked, expected = zip(*(pair for s in batch for pair in s.record["qa"]), strict=True)
        pairs += zip(expected, answer_codes(model, codes[rows], asked, 8), strict=True)
    return score_answers(pairs)


def scene_captions(model: Multimodal, folder: Path, split: str) -> dict[str, float]:
    samples = first(folder, split)
    said: dict[str, str] = {}
    for batch in batches(samples, f"scenes {split}"):
        captions = caption_codes(model, codes_of(model, batch))
        said |= zip((s.key for s in batch), captions, strict=True)
    truth = {s.key: Scene.from_json(s.record["scene"]) for s in samples}
    return score_scene_captions(said, truth)


def scene_drawings(
    model: Multimodal, folder: Path, pictures: Path | None, many: int
) -> dict[str, object]:
    prompts, samples = [], []
    for sample in first(folder):
        if caption := whole_caption(sample.record):
            prompts.append(caption)
            samples.append(sample)
    figures: dict[str, object] = {"prompts": len(prompts)}

    def score(name: str, codes: Tensor) -> None:
        drawn = [to_image(image) for image in decode_images(model, codes)]
        figures[name] = score_scene_drawings(prompts, drawn)
        if pictures:
            pictures.mkdir(parents=True, exist_ok=True)
            grid_of(drawn[:40]).save(pictures / f"{name}.png")
            (pictures / "prompts.txt").write_text("\n".join(prompts[:40]) + "\n")

    # The true pictures after encoding and decoding: what no drawing can be better than.
    score("reconstructed", codes_of(model, samples))
    for method, candidates in (("masked", 1), ("causal", 1), ("causal", many)):
        name = method if candidates == 1 else f"{method}, best of {candidates}"
        size, codes = BATCH // candidates, []
        for start in tqdm(range(0, len(prompts), size), desc=name, disable=None):
            some = prompts[start : start + size]
            codes.append(draw_codes(model, some, method=method, candidates=candidates,
                                    numbers=range(start, start + len(some))))  # fmt: skip
        score(name, torch.cat(codes))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="starter")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--scenes", default="scenes", help="the folder of scenes under --data")
    parser.add_argument("--only", nargs="*", metavar="PART", help="photos, answers, scenes, "
                        "heldout, scene_answers, scene_search, drawings (default all)")  # fmt: skip
    parser.add_argument("--candidates", type=int, default=16, help="of which the best is kept")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="where to leave the first drawings")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, scenes = load(options.model), options.data / options.scenes
    parts = {
        "photos": lambda: photos(model, options.data / "flickr8k"),
        "answers": lambda: answers(model, list(Shards(options.data / "easy_vqa", "val"))),
        "scenes": lambda: scene_captions(model, scenes, "val"),
        "heldout": lambda: scene_captions(model, scenes, "heldout"),
        "scene_answers": lambda: answers(model, first(scenes)),
        "scene_search": lambda: search(model, first(scenes)),
        "drawings": lambda: scene_drawings(model, scenes, options.pictures, options.candidates),
    }
    figures = {}
    for name in options.only or parts:
        figures[name] = parts[name]()
        print(name, json.dumps(figures[name]), file=sys.stderr)
    print(json.dumps({"model": model.fingerprint, **figures, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
