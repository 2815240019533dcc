"""``multimodal data report``: a page about the contents of shard folders.

It reads every sample. The page has counts, image sizes, texts, licences and sources, what was left
out when the folder was built, the share of each folder in a training mixture, and random samples.
"""

import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from multimodal.commands.options import check_output
from multimodal.data.documents import image_suffixes, images_in
from multimodal.data.images import open_header, open_image
from multimodal.data.samples import Sample, has_text, texts_of
from multimodal.data.shards import Shards, read_manifest, splits_of
from multimodal.eval.page import Bars, Figure, Section, page
from multimodal.files import atomic_file, write_json
from multimodal.terminal import Parser, print_error

EPILOG = """The page needs no network and no other file. --weights are data.weights of a recipe. The
page then shows how often a sample of each folder is read per epoch.

examples:
  multimodal data report data/photos
  multimodal data report data/photos data/scenes --weights 3 1 --out mixture.html
  multimodal data report data/photos --duplicates near --json report.json
"""
SHOWN = 24  # samples of each folder
NAMED = 5  # of what cannot be read, in the terminal
FREQUENT_WORDS = 25
STOP_WORDS = frozenset(
    "a an the of in on at to and or is are was were be with by for from as it its his her their "
    "this that there what who how which does do has have no not one two".split()
)
_WORD = re.compile(r"\w+(?:'\w+)?")
SIDES = (32, 64, 128, 256, 512, 1024, 2048)
ASPECTS = (0.5, 0.75, 0.95, 1.05, 1.34, 2.0)
LENGTHS = (0, 3, 6, 9, 12, 16, 24, 32, 64)


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="multimodal data report",
        description="Write a page about shard folders: counts, histograms, licences, samples.",
        epilog=EPILOG,
    )
    parser.add_argument("folders", metavar="DIR", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--json", type=Path, help="a JSON file of the figures as well")
    parser.add_argument(
        "--duplicates",
        choices=("exact", "near"),
        help="look for copies, also between splits and folders",
    )
    parser.add_argument("--weights", type=float, nargs="+", help="of the folders in a mixture")
    parser.add_argument("--seed", type=int, default=0, help="chooses the samples to show")
    arguments = parser.parse_args(argv)
    check_output(arguments.out, (".html",))
    if arguments.json:
        check_output(arguments.json, (".json",))
    if arguments.weights and len(arguments.weights) != len(arguments.folders):
        raise ValueError(
            f"{len(arguments.weights)} --weights for {len(arguments.folders)} folders: expected "
            "one weight for each folder"
        )
    if len(set(arguments.folders)) < len(arguments.folders):
        raise ValueError("a folder is named twice: give each folder once, its share by --weights")
    if arguments.weights and not min(arguments.weights) > 0:
        raise ValueError(f"--weights {arguments.weights}: expected positive numbers")
    folders = [read_folder(folder, arguments.seed) for folder in arguments.folders]
    for folder in folders:
        for problem in folder.unreadable[:NAMED]:
            print_error(f"{folder.path}: cannot be read: {problem}")
        if len(folder.unreadable) > NAMED:
            print_error(f"{folder.path}: {len(folder.unreadable):,} in all, see --json")
    sections = [mixture(folders, arguments.weights)]
    for folder in folders:
        sections += folder.sections()
    numbers: dict[str, Any] = {"folders": [folder.to_json() for folder in folders]}
    if arguments.duplicates:
        section, copies = duplicates(arguments.folders, arguments.duplicates)
        sections.append(section)
        numbers["duplicates"] = copies
    total = sum(folder.counts.total() for folder in folders)
    about = f"{total:,} samples in {len(folders)} folder{'s' if len(folders) > 1 else ''}"
    with atomic_file(arguments.out) as file:
        file.write_text(page("Data report", about, sections), "utf-8")
    if arguments.json:
        write_json(arguments.json, numbers)
    print(f"{arguments.out}: {about}")
    return 0


@dataclass
class FolderStats:
    """Counts over the samples of a shard folder.

    Args:
        path: the folder.
        manifest: its manifest.
        counts: samples of each split.
        kinds: texts of each kind.
        sides: images by their shorter side, in bins of pixels.
        aspects: images by width over height, in bins.
        lengths: captions by their number of words, in bins.
        captions: samples by their number of captions.
        words: words in all texts, lower case.
        licenses: samples of each licence.
        sources: samples of each source.
        unreadable: an error for each image or sample that cannot be read.
        shown: random samples.
    """

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
        """Count a sample by its record."""
        record = sample.record
        self.counts[split] += 1
        captions = record.get("captions", [])
        self.kinds["captions"] += len(captions)
        self.kinds["questions"] += len(record.get("qa", []))
        self.kinds["labels"] += record.get("label") not in (None, "")
        self.kinds["documents"] += "content" in record
        self.kinds["samples without any text"] += not has_text({"captions": [], **record})
        self.captions[str(len(captions))] += 1
        for caption in captions:
            self.lengths[bin_name(len(_WORD.findall(caption)), LENGTHS)] += 1
        for text in texts_of(record):
            self.words.update(_WORD.findall(text.lower()))
        self.licenses[str(record.get("license", "not given"))] += 1
        self.sources[str(record.get("source", "not given"))] += 1

    def measure(self, sample: Sample) -> None:
        """Count the sizes of a sample's images. Reads only their headers.

        Raises:
            ValueError: for the first one that is no image.
        """
        for data in images_in(sample):
            try:
                with open_header(data) as image:
                    width, height = image.size
            except Exception as error:  # Pillow's plugins raise any type of error
                raise ValueError(f"not an image that can be read ({error})") from error
            self.sides[bin_name(min(width, height), SIDES)] += 1
            self.aspects[bin_name(width / height, ASPECTS)] += 1

    def sections(self) -> list[Section]:
        """The sections of the page."""
        built = {
            name: self.manifest[name]
            for name in ("made_by", "source", "image_size", "fit")
            if self.manifest.get(name) is not None
        }
        about = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in built.items())
        frequent = self.words.most_common(FREQUENT_WORDS * 3)
        words = [(word, n) for word, n in frequent if word not in STOP_WORDS]
        bars = [
            Bars("samples by split", dict(sorted(self.counts.items()))),
            Bars("texts", dict(+self.kinds)),
            Bars("captions of a sample", in_order(self.captions)),
            Bars("words of a caption", in_order(self.lengths)),
            Bars("shorter side, pixels", in_order(self.sides)),
            Bars("width by height", in_order(self.aspects)),
            Bars("licence", dict(self.licenses.most_common(12))),
            Bars("source", dict(self.sources.most_common(12))),
            Bars("frequent words", dict(words[:FREQUENT_WORDS])),
        ]
        cleaning = dict(self.manifest.get("cleaning") or {})
        changed = cleaning.pop("changed", {})
        rejected = self.manifest.get("rejected")
        if isinstance(rejected, dict) and rejected:
            bars.append(Bars("left out when it was built", rejected))
        if changed:
            bars.append(Bars("changed when it was built", changed))
        if self.unreadable:
            bars.append(Bars("unreadable", {"images or samples": len(self.unreadable)}))
        if cleaning:
            steps = ", ".join(f"{name} {value}" for name, value in cleaning.items())
            about += f"; cleaning: {steps}"
        rows = [(f"{len(self.shown)} random samples", self.shown)]
        filled = [chart for chart in bars if chart.values]
        return [Section(str(self.path), about, rows if self.shown else [], bars=filled)]

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.path),
            "samples": self.counts.total(),
            "splits": self.counts,
            "texts": self.kinds,
            "licenses": self.licenses,
            "sources": self.sources,
            "shorter_side": in_order(self.sides),
            "aspect": in_order(self.aspects),
            "caption_words": in_order(self.lengths),
            "unreadable": self.unreadable,
            "cleaning": self.manifest.get("cleaning"),
            "rejected": self.manifest.get("rejected"),
            "words": dict(self.words.most_common(1000)),
        }


def bin_name(value: float, edges: Iterable[float]) -> str:
    """The name of a value's bin. A bin includes its lower edge, but not its upper edge."""
    low: float | None = None
    for edge in edges:
        if value < edge:
            return f"below {edge:g}" if low is None else f"{low:g} to {edge:g}"
        low = edge
    return f"from {low:g}"


def in_order(bins: Counter[str]) -> dict[str, float]:
    """Bins sorted by their numbers in their names."""

    def edge(name: str) -> tuple[float, bool]:
        number = float(re.findall(r"[\d.]+", name)[0])
        return number, not name.startswith("below")

    return {name: bins[name] for name in sorted(bins, key=edge)}


def read_folder(path: Path, seed: int) -> FolderStats:
    """Read all samples of a shard folder. ``seed`` chooses the samples to show."""
    folder = FolderStats(path, read_manifest(path))
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
                        folder.shown.append(figure_of(sample))
            except ValueError as error:
                folder.unreadable.append(f"{sample.key}: {error}")
    return folder


def figure_of(sample: Sample) -> Figure:
    """The first image of a sample with its first question, or else its first text."""
    record = sample.record
    texts = [*islice(texts_of(record), 1)] if not record.get("qa") else []
    texts += [f"{question} {answer}" for question, answer in record.get("qa", [])[:1]]
    first = sample.members[image_suffixes(sample.members)[0]]
    return Figure(open_image(first, name=sample.key), f"{sample.key}: {'; '.join(texts)}")


def mixture(folders: list[FolderStats], weights: list[float] | None) -> Section:
    """The share of each folder in an epoch, and how often each of its samples is read."""
    train = {
        str(folder.path): folder.counts["train"] or folder.counts.total() for folder in folders
    }
    total = sum(train.values())
    shares = {name: count / max(1, total) for name, count in train.items()}
    if weights:
        shares = {name: weight / sum(weights) for name, weight in zip(train, weights, strict=True)}
    passes = {name: share * total / max(1, train[name]) for name, share in shares.items()}
    about = "Training split, every sample once per epoch."
    if weights:
        about = "Training split, with the given weights."
    return Section(
        "Mixture",
        about,
        bars=[
            Bars("samples", dict(train)),
            Bars("share of an epoch", shares),
            Bars("passes over the folder per epoch", passes),
        ],
    )


def duplicates(folders: list[Path], kind: str) -> tuple[Section, dict[str, Any]]:
    """Find copies of images.

    Args:
        folders: shard folders.
        kind: exact or near.

    Returns:
        The section of the page with the first pairs, pairs between splits or folders first, and the
        numbers of copies.
    """
    from multimodal.data.near_duplicates import find_copies, hash_image

    prints, sources = [], list[tuple[Shards, str, int]]()
    for folder in dict.fromkeys(folders):
        for split in splits_of(folder):
            shards = Shards(folder, split)
            description = f"copies {folder} {split}"
            bar = tqdm(shards, description, unit="sample", file=sys.stderr, disable=None)
            for number, sample in enumerate(bar):
                try:
                    prints.append(hash_image(sample.image, sample.key))
                    sources.append((shards, split, number))
                except ValueError:
                    continue  # it is already in unreadable
    copies = [copy for copy in find_copies(prints) if kind == "near" or copy.kind == "exact"]
    leaks = [copy for copy in copies if sources[copy.first][:2] != sources[copy.second][:2]]
    rows = []
    for copy in [*leaks, *(copy for copy in copies if copy not in leaks)][: SHOWN // 2]:
        name = (
            f"{copy.kind} ({copy.similarity:.3f}){', between splits or folders' * (copy in leaks)}"
        )
        figures = [
            Figure(open_image(shards[n].image), f"{shards.folder} {split}: {shards.key(n)}")
            for shards, split, n in (sources[copy.first], sources[copy.second])
        ]
        rows.append((name, figures))
    counts = {
        "images": len(prints),
        "exact copies": sum(copy.kind == "exact" for copy in copies),
        "near copies": sum(copy.kind == "near" for copy in copies),
        "between splits or folders": len(leaks),
    }
    about = "A model has already seen an image that is in its training split and in another split."
    section = Section("Duplicates", about, rows, bars=[Bars("copies", dict(counts))])
    return section, counts
