"""``multimodal data report``: what shard folders hold, as one page to look at.

Every sample is read: how many there are, how large, what is said of them, whose they are, what was
left out when they were built, how much of a training mixture each folder is, and some of them as
they are, chosen by the seed alone.
"""

import argparse
import io
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from multimodal.commands.options import check_output
from multimodal.data.builder.records import has_text
from multimodal.data.documents import image_suffixes, images_in
from multimodal.data.images import FORMATS, open_image
from multimodal.data.samples import Sample, texts_of
from multimodal.data.shards import Shards, read_manifest, splits_of
from multimodal.eval.page import Bars, Figure, Section, page
from multimodal.files import atomic_file, write_json

EPILOG = """The page needs no network and no other file. --weights are those of data.weights in a
recipe: the page then says how often a sample of each folder is seen in an epoch.

examples:
  multimodal data report data/photos
  multimodal data report data/photos data/scenes --weights 3 1 --out mixture.html
  multimodal data report data/photos --duplicates near --json report.json
"""
SHOWN = 24  # samples of each folder, as pictures
FREQUENT = 25  # words
GRAMMAR = frozenset(
    "a an the of in on at to and or is are was were be with by for from as it its his her their "
    "this that there what who how which does do has have no not one two".split()
)
_WORD = re.compile(r"\w+(?:'\w+)?")
SIDES = (32, 64, 128, 256, 512, 1024, 2048)
ASPECTS = (0.5, 0.75, 0.95, 1.05, 1.34, 2.0)
LENGTHS = (0, 3, 6, 9, 12, 16, 24, 32, 64)


def main(argv: list[str]) -> int:
    made = argparse.ArgumentParser(
        prog="multimodal data report",
        description="Write a page about shard folders: counts, histograms, licences, samples.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("folders", metavar="DIR", type=Path, nargs="+")
    made.add_argument("--out", type=Path, default=Path("report.html"), help="default report.html")
    made.add_argument("--json", type=Path, help="a JSON file of the figures as well")
    made.add_argument("--duplicates", choices=("exact", "near"),
                      help="look for copies, across splits and folders too")  # fmt: skip
    made.add_argument("--weights", type=float, nargs="+", help="of the folders in a mixture")
    made.add_argument("--seed", type=int, default=0, help="of the samples that are shown")
    arguments = made.parse_args(argv)
    check_output(arguments.out, (".html",))
    if arguments.json:
        check_output(arguments.json, (".json",))
    if arguments.weights and len(arguments.weights) != len(arguments.folders):
        raise ValueError(
            f"{len(arguments.weights)} --weights for {len(arguments.folders)} folders: one each"
        )
    if len(set(arguments.folders)) < len(arguments.folders):
        raise ValueError("a folder is named twice: give each once, and --weights for its share")
    if arguments.weights and not min(arguments.weights) > 0:
        raise ValueError(f"--weights {arguments.weights}: expected positive numbers")
    found = [read_folder(folder, arguments.seed) for folder in arguments.folders]
    sections = [mixture(found, arguments.weights)]
    for one in found:
        sections += one.sections()
    figures: dict[str, Any] = {"folders": [one.figures() for one in found]}
    if arguments.duplicates:
        section, copies = duplicates(arguments.folders, arguments.duplicates)
        sections.append(section)
        figures["duplicates"] = copies
    total = sum(one.counts.total() for one in found)
    about = f"{total:,} samples in {len(found)} folder{'s' if len(found) > 1 else ''}"
    with atomic_file(arguments.out) as file:
        file.write_text(page("Data report", about, sections), "utf-8")
    if arguments.json:
        write_json(arguments.json, figures)
    print(f"{arguments.out}: {about}")
    return 0


@dataclass
class Folder:
    """What was counted in a shard folder; counts: the samples of each split."""

    path: Path
    manifest: dict[str, Any]
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    sides: Counter[str] = field(default_factory=Counter)
    aspects: Counter[str] = field(default_factory=Counter)
    lengths: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    shown: list[Figure] = field(default_factory=list)

    def add(self, split: str, sample: Sample) -> None:
        record = sample.record
        self.counts[split] += 1
        captions, asked = record.get("captions", []), record.get("qa", [])
        self.kinds["captions"] += len(captions)
        self.kinds["questions"] += len(asked)
        self.kinds["labels"] += "label" in record
        self.kinds["documents"] += "content" in record
        self.kinds["samples without any text"] += not has_text({"captions": [], **record})
        self.captions[str(len(captions))] += 1
        for caption in captions:
            self.lengths[between(len(_WORD.findall(caption)), LENGTHS)] += 1
        for text in texts_of(record):
            self.words.update(_WORD.findall(text.lower()))
        self.licenses[str(record.get("license", "not said"))] += 1
        self.sources[str(record.get("source", "not said"))] += 1

    def measure(self, sample: Sample) -> None:
        """The sizes of its images, from their headers alone."""
        for data in images_in(sample):
            try:
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    width, height = image.size
            except Exception as error:  # Pillow's plugins raise whatever their parsing runs into
                self.unreadable.append(f"{sample.key}: {error}")
                continue
            self.sides[between(min(width, height), SIDES)] += 1
            self.aspects[between(width / height, ASPECTS)] += 1

    def sections(self) -> list[Section]:
        built = {
            name: self.manifest[name] for name in ("made_by", "source", "image_size", "fit")
            if self.manifest.get(name) is not None
        }  # fmt: skip
        about = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in built.items())
        many = {k: v for k, v in self.words.most_common(FREQUENT * 3) if k not in GRAMMAR}
        words = dict(list(many.items())[:FREQUENT])
        bars = [
            Bars("samples by split", dict(sorted(self.counts.items()))),
            Bars("texts", dict(+self.kinds)),
            Bars("captions of a sample", in_order(self.captions)),
            Bars("words of a caption", in_order(self.lengths)),
            Bars("shorter side, pixels", in_order(self.sides)),
            Bars("width by height", in_order(self.aspects)),
            Bars("licence", dict(self.licenses.most_common(12))),
            Bars("source", dict(self.sources.most_common(12))),
            Bars("frequent words", dict(words)),
        ]
        cleaning = dict(self.manifest.get("cleaning") or {})
        changed = cleaning.pop("changed", {})
        rejected = self.manifest.get("rejected")
        if isinstance(rejected, dict) and rejected:
            bars.append(Bars("left out when it was built", rejected))
        if changed:
            bars.append(Bars("changed when it was built", changed))
        if self.unreadable:
            bars.append(Bars("images that cannot be read", {"images": len(self.unreadable)}))
        if cleaning:
            steps = ", ".join(f"{name} {value}" for name, value in cleaning.items())
            about += f"; cleaning: {steps}"
        rows = [(f"{len(self.shown)} samples, by the seed", self.shown)]
        drawn = [one for one in bars if one.values]
        return [Section(str(self.path), about, rows if self.shown else [], bars=drawn)]

    def figures(self) -> dict[str, Any]:
        return {
            "folder": str(self.path), "samples": self.counts.total(), "splits": self.counts,
            "texts": self.kinds, "licenses": self.licenses, "sources": self.sources,
            "shorter_side": in_order(self.sides), "aspect": in_order(self.aspects),
            "caption_words": in_order(self.lengths), "unreadable": self.unreadable,
            "cleaning": self.manifest.get("cleaning"), "rejected": self.manifest.get("rejected"),
            "words": dict(self.words.most_common(1000)),
        }  # fmt: skip


def between(value: float, edges: Iterable[float]) -> str:
    """The name of the bin that a value is in: from its edge on, below the next."""
    low: float | None = None
    for edge in edges:
        if value < edge:
            return f"below {edge:g}" if low is None else f"{low:g} to {edge:g}"
        low = edge
    return f"from {low:g}"


def in_order(bins: Counter[str]) -> dict[str, float]:
    """Bins by their numbers, not by how full they are."""

    def edge(name: str) -> tuple[float, bool]:
        number = float(re.findall(r"[\d.]+", name)[0])
        return number, not name.startswith("below")

    return {name: bins[name] for name in sorted(bins, key=edge)}


def read_folder(path: Path, seed: int) -> Folder:
    folder = Folder(path, read_manifest(path))
    rng = random.Random(f"report/{seed}")
    for split in splits_of(path):
        shards = Shards(path, split)
        images = shards.encoding is None
        share = SHOWN // len(splits_of(path))
        chosen = set(rng.sample(range(len(shards)), min(share, len(shards))))
        bar = tqdm(shards, f"{path} {split}", unit="sample", file=sys.stderr, disable=None)
        for number, sample in enumerate(bar):
            try:
                folder.add(split, sample)
                if images:
                    folder.measure(sample)
                    if number in chosen and image_suffixes(sample.members):
                        folder.shown.append(shown(sample))
            except ValueError as error:
                folder.unreadable.append(f"{sample.key}: {error}")
    return folder


def shown(sample: Sample) -> Figure:
    record = sample.record
    said = [*islice(texts_of(record), 1)] if not record.get("qa") else []
    said += [f"{question} {answer}" for question, answer in record.get("qa", [])[:1]]
    first = sample.members[image_suffixes(sample.members)[0]]
    return Figure(open_image(first, name=sample.key), f"{sample.key}: {'; '.join(said)}")


def mixture(folders: list[Folder], weights: list[float] | None) -> Section:
    """How much of an epoch each folder is, and how often its samples come."""
    train = {str(one.path): one.counts["train"] or one.counts.total() for one in folders}
    total = sum(train.values())
    shares = {name: count / max(1, total) for name, count in train.items()}
    if weights:
        shares = {name: weight / sum(weights) for name, weight in zip(train, weights, strict=True)}
    passes = {name: share * total / max(1, train[name]) for name, share in shares.items()}
    about = "Of the training split: every sample once an epoch."
    if weights:
        about = "Of the training split, by the weights given."
    return Section(
        "Mixture",
        about,
        bars=[
            Bars("samples", dict(train)),
            Bars("share of an epoch", shares),
            Bars("passes over it in an epoch", passes),
        ],
    )


def duplicates(folders: list[Path], kind: str) -> tuple[Section, dict[str, Any]]:
    """Copies, those between splits or folders by themselves, and the first pairs as pictures."""
    from multimodal.data.near_duplicates import find_copies, hash_image

    prints, places = [], list[tuple[Shards, str, int]]()
    for folder in dict.fromkeys(folders):
        for split in splits_of(folder):
            shards = Shards(folder, split)
            bar = tqdm(shards, f"copies {folder} {split}", unit="sample", file=sys.stderr,
                       disable=None)  # fmt: skip
            for number, sample in enumerate(bar):
                try:
                    prints.append(hash_image(sample.image, sample.key))
                    places.append((shards, split, number))
                except ValueError:
                    continue  # counted as unreadable above
    copies = [one for one in find_copies(prints) if kind == "near" or one.kind == "exact"]
    leaks = [one for one in copies if places[one.first][:2] != places[one.second][:2]]
    rows = []
    for one in [*leaks, *(pair for pair in copies if pair not in leaks)][: SHOWN // 2]:
        pair = [places[one.first], places[one.second]]
        name = f"{one.kind} ({one.similarity:.3f}){', between splits or folders' * (one in leaks)}"
        figures = [
            Figure(open_image(shards[n].image), f"{shards.folder} {split}: {shards.key(n)}")
            for shards, split, n in pair
        ]
        rows.append((name, figures))
    counts = {
        "images": len(prints),
        "exact copies": sum(one.kind == "exact" for one in copies),
        "near copies": sum(one.kind == "near" for one in copies),
        "between splits or folders": len(leaks),
    }
    about = "An image that is in two splits was seen before it is measured."
    section = Section("Duplicates", about, rows, bars=[Bars("found", dict(counts))])
    return section, counts
