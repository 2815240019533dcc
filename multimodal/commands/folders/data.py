"""``multimodal data``: build, index and check shard folders."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from multimodal.commands.options import add_engine
from multimodal.data.indexing import index_folder
from multimodal.data.shards import Shards, read_manifest
from multimodal.data.verify import check, check_contents, check_text
from multimodal.files import atomic_file, write_json
from multimodal.terminal import Parser, one_line

FIRST_SAMPLES = 256  # whose texts `data index` reads

EPILOG = """examples:
  multimodal data build photos/ shards/ --image-size 256 --fit crop --val-share 0.05
  multimodal data build captions.csv shards/ --image-column file --text-column caption
  multimodal data build flickr8k/captions.txt shards/ --images flickr8k/Images/
  multimodal data build captions_val2014.json shards/ --images val2014/
  multimodal data build v2_OpenEnded_mscoco_val2014_questions.json shards/ --images val2014/ \
      --answers v2_mscoco_val2014_annotations.json
  multimodal data build hf://datasets/user/photos shards/ --image-size 256
  multimodal data index /data/laion             # existing tars: nothing is rewritten
  multimodal data index /read/only --out mine/  # the same, with links to the tars
  multimodal data check shards/
  multimodal data card shards/ --out croissant.json
  multimodal data duplicates shards/            # copies, also those between train and val
  multimodal data questions shards/ asked/      # is there a dog? from the captions
  multimodal data scenes scenes/ --count 2000 --seed 0
"""


def main(argv: Sequence[str]) -> int:
    """Run ``multimodal data ARGV...``.

    Returns:
        The exit status.

    Raises:
        ValueError, OSError: for errors that the user can fix.
        SystemExit: 2 for wrong usage.
    """
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="multimodal data",
        description=__doc__,
        epilog=EPILOG,
    )
    verbs = parser.add_subparsers(
        metavar="build|index|check|card|duplicates|questions|scenes", required=True
    )

    _add_build(verbs.add_parser)
    index = verbs.add_parser("index", help="write manifest and indexes for existing shards")
    index.add_argument("folder", metavar="DIR", type=Path, help="a folder of .tar shards")
    index.add_argument("--out", type=Path, help="write here instead, with links to the tars of DIR")
    index.set_defaults(run=_index)

    check = verbs.add_parser("check", help="verify every byte of a shard folder")
    check.add_argument("folder", metavar="DIR", type=Path)
    check.add_argument("--decode", action="store_true", help="also decode every image and text")
    check.set_defaults(run=_check)

    card = verbs.add_parser(
        "card", help="what a shard folder holds as Croissant JSON-LD: source, licence, counts"
    )
    card.add_argument("folder", metavar="DIR", type=Path)
    card.add_argument("--name", default="", help="of the data (default: that of the folder)")
    card.add_argument("--out", type=Path, metavar="FILE", help="by default it is printed")
    card.set_defaults(run=_card)

    duplicates = verbs.add_parser(
        "duplicates",
        help="find copies: the same image, or one encoded again, resized, slightly cropped",
        description="Prints a line for each pair: kind, similarity, and both as FOLDER:SPLIT:KEY. "
        "Near copies are for photos: different drawings or pages look alike. Exit status 1 if "
        "copies are in different splits or folders: then training saw images of the evaluation.",
    )
    duplicates.add_argument("folders", metavar="DIR", type=Path, nargs="+")
    duplicates.add_argument("--output", type=Path, help="also write the pairs to a JSON Lines file")
    duplicates.set_defaults(run=_duplicates)
    questions = verbs.add_parser(
        "questions",
        help="add questions about presence, from the captions",
        description='Write shards again, with questions such as "is there a dog?" in the records. '
        "As many are about objects that captions name as about objects that none names. A model "
        "that learns captions alone says yes to everything.",
    )
    questions.add_argument("source", metavar="SHARDS", help="a shard folder, of images or codes")
    questions.add_argument("out", metavar="OUT", help="the folder to write")
    questions.add_argument(
        "--pairs", type=int, default=2, help="questions with yes of a sample, as many with no"
    )
    questions.add_argument("--seed", type=int, default=0)
    questions.set_defaults(run=_questions)

    scenes = verbs.add_parser("scenes", help="draw a synthetic dataset of simple scenes")
    scenes.add_argument("out", metavar="OUT", type=Path)
    scenes.add_argument("--count", type=int, required=True, help="number of training scenes")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.add_argument("--size", type=int, default=64, help="pixels of a side (default 64)")
    scenes.set_defaults(run=_scenes)
    return parser


def _add_build(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    build = add_parser(
        "build",
        help="turn images and text into shards",
        description="SOURCE is a folder of images with .txt or .json beside them or with a "
        "metadata.jsonl, .csv or .parquet; a table (.csv, .tsv, .txt, .jsonl, .parquet, .arrow), "
        "with a header or without; a folder of tables, or one of Hugging Face's save_to_disk; a "
        ".json (a list of objects, LLaVA, COCO or Karpathy captions, VQA questions); webdataset "
        "shards (.tar, .tar.gz); or a data set of the Hub, hf://datasets/USER/NAME[/SUBSET]"
        "[@REVISION], which is read as a stream. "
        "OUT/rejected.jsonl lists the samples that cannot be used, with file and line.",
    )
    build.add_argument("source", metavar="SOURCE")
    build.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    build.add_argument(
        "--image-size", type=int, help="make images square of this size (default: keep)"
    )
    build.add_argument("--fit", choices=("squash", "crop", "letterbox"), default="squash")
    build.add_argument("--shard-size", type=int, default=1000, help="samples in a shard")
    build.add_argument(
        "--val-share", type=float, default=0.0, help="share of the split val (by a hash of the key)"
    )
    build.add_argument("--quality", type=int, default=92, help="of JPEGs that are encoded again")
    build.add_argument("--image-column", help="of a table; guessed if not given")
    build.add_argument("--text-column", help="of a table; guessed if not given")
    build.add_argument(
        "--images",
        type=Path,
        help="folder of a table's or annotations' images; default: the folder of the file",
    )
    build.add_argument("--answers", type=Path, help="the file of the answers to VQA questions")
    build.add_argument("--without-text", action="store_true", help="keep images without text")
    build.add_argument(
        "--whole-text",
        action="store_true",
        help="a .txt beside an image is one caption; default: each of its lines is one",
    )
    build.add_argument("--overwrite", action="store_true", help="replace the shards in OUT")
    add_engine(build)
    steps = build.add_argument_group("cleaning", "all steps are off by default")
    steps.add_argument("--min-side", type=int, default=0, help="least pixels of the shorter side")
    steps.add_argument(
        "--max-aspect-ratio",
        type=float,
        default=0.0,
        help="greatest ratio of longer to shorter side",
    )
    steps.add_argument("--min-words", type=int, default=0, help="least words of a caption")
    steps.add_argument("--max-words", type=int, default=0, help="most words of a caption")
    steps.add_argument(
        "--drop-copies",
        choices=("exact", "near"),
        default="",
        help="reject copies of images, in any split; near: for photos only",
    )
    steps.add_argument(
        "--blocklist",
        type=Path,
        metavar="FILE",
        help="words, one a line: reject samples with one of them",
    )
    steps.add_argument(
        "--personal-data",
        choices=("mask", "drop"),
        default="",
        help="e-mail addresses and telephone numbers in texts",
    )
    steps.add_argument(
        "--licenses",
        nargs="+",
        default=[],
        metavar="NAME",
        help="reject samples with other licenses",
    )
    build.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    from multimodal.data.builder.build import REJECTED, build_shards
    from multimodal.data.builder.cleaning import Cleaning, read_blocklist
    from multimodal.data.builder.sources import expected_samples, open_source

    cleaning = Cleaning(
        min_side=arguments.min_side,
        max_aspect_ratio=arguments.max_aspect_ratio,
        min_words=arguments.min_words,
        max_words=arguments.max_words,
        copies=arguments.drop_copies,
        blocklist=read_blocklist(arguments.blocklist) if arguments.blocklist else (),
        personal_data=arguments.personal_data,
        licenses=arguments.licenses,
    )
    source = open_source(arguments.source)
    report = build_shards(
        source,
        arguments.out,
        image_size=arguments.image_size,
        fit=arguments.fit,
        shard_size=arguments.shard_size,
        val_share=arguments.val_share,
        quality=arguments.quality,
        image_column=arguments.image_column,
        text_column=arguments.text_column,
        need_text=not arguments.without_text,
        whole_text=arguments.whole_text,
        images=arguments.images,
        answers=arguments.answers,
        cleaning=cleaning,
        overwrite=arguments.overwrite,
        engine=arguments.engine,
        workers=arguments.workers,
        progress=_progress("sample", expected_samples(source)),
    )
    if report is None:  # only the first rank reports
        return 0
    for reason, count in sorted(report.reasons.items()):
        print(f"rejected {count:,}: {reason}", file=sys.stderr)
    if report.rejected:
        print(f"see {arguments.out / REJECTED}", file=sys.stderr)
    for what, count in sorted(report.changed.items()):
        print(f"changed {count:,}: {what}", file=sys.stderr)
    for what, count in sorted(report.ignored.items()):
        print(f"ignored {count:,}: {what}", file=sys.stderr)
    for what, count in sorted(report.read.items()):
        print(f"read {count:,}: {what}", file=sys.stderr)
    if arguments.val_share and not report.splits.get("val"):
        print("no sample is in the split val; try a larger --val-share", file=sys.stderr)
    splits = ", ".join(f"{split} {count:,}" for split, count in sorted(report.splits.items()))
    print(f"{arguments.out}: kept {report.kept:,} of {report.total:,} samples ({splits})")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    ignored = Counter[str]()
    entries = index_folder(
        arguments.folder,
        arguments.out,
        ignored=ignored,
        on_problem=_print_error,
        progress=_progress("shard"),
    )
    for what, number in sorted(ignored.items()):
        print(f"ignored {number:,}: {what}", file=sys.stderr)
    count = sum(entry["samples"] for entry in entries)
    target = arguments.out or arguments.folder
    _print_first_texts(target)
    print(f"{target}: {len(entries)} shards, {count:,} samples")
    return 0


def _print_first_texts(folder: Path) -> None:
    """Say what is wrong with the texts of the first samples: an index does not read the others."""
    notes, looked = Counter[str](), 0
    for sample in islice(Shards(folder), FIRST_SAMPLES):
        looked += 1
        try:
            check_text(sample, notes)
        except ValueError as error:
            _print_error(f"{folder}: {error}")
    for what, number in sorted(notes.items()):
        print(f"of the first {looked:,} samples, {number:,}: {what}", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.folder
    problems = 0
    with tqdm(unit="shard", file=sys.stderr, disable=None) as bar:
        for problem in check(folder, on_shard=lambda _: bar.update()):
            problems += 1
            _print_error(problem)
    if arguments.decode and not problems:
        notes = Counter[str]()
        for problem in check_contents(folder, _progress("sample"), notes):
            problems += 1
            _print_error(problem)
        for what, number in sorted(notes.items()):
            print(f"{folder}: {number:,}: {what}", file=sys.stderr)
    if problems:
        print(f"{folder}: {problems} problem{'s' if problems > 1 else ''}")
        return 1
    manifest = read_manifest(folder)
    count = sum(entry["samples"] for entry in manifest["shards"])
    print(f"{folder}: all is well, {len(manifest['shards'])} shards, {count:,} samples")
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from multimodal.origin.data_card import data_card

    card = data_card(arguments.folder, arguments.name)
    if arguments.out is None:
        print(json.dumps(card, ensure_ascii=False, indent=1))
        return 0
    write_json(arguments.out, card)
    print(arguments.out)
    return 0


def _questions(arguments: argparse.Namespace) -> int:
    from multimodal.data.questions import add_questions

    total = sum(entry["samples"] for entry in read_manifest(arguments.source)["shards"])
    with tqdm(total=total, desc="samples", unit="sample", disable=None) as bar:
        count = add_questions(
            arguments.source, arguments.out, arguments.pairs, arguments.seed, bar.update
        )
    print(f"{arguments.out}: {total} samples, {count} questions")
    return 0


def _duplicates(arguments: argparse.Namespace) -> int:
    from multimodal.data.duplicates import find_duplicates, hash_folders

    images = hash_folders(
        arguments.folders,
        on_problem=_print_error,
        progress=lambda samples, total: _progress("image", total, "images")(samples),
    )
    count = len(images.hashes)
    with tqdm(total=count, desc="compared", file=sys.stderr, disable=None) as bar:
        pairs = find_duplicates(images, bar.update)
    for pair in pairs:
        print(
            f"{pair.kind}\t{pair.similarity:.3f}\t{':'.join(pair.first)}\t{':'.join(pair.second)}"
        )
    if arguments.output:
        lines = [json.dumps(pair.to_json(), ensure_ascii=False) + "\n" for pair in pairs]
        with atomic_file(arguments.output) as part:
            part.write_text("".join(lines), "utf-8", errors="backslashreplace")
    exact = sum(pair.kind == "exact" for pair in pairs)
    leaks = sum(pair.is_leak for pair in pairs)
    skipped = f"; {images.unreadable} could not be read" if images.unreadable else ""
    print(
        f"{count:,} images: {exact} exact copies, {len(pairs) - exact} near, "
        f"{leaks} of them between splits or folders{skipped}",
        file=sys.stderr,
    )
    return 1 if leaks else 0


def _progress(
    unit: str, total: int | None = None, description: str | None = None
) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A function that wraps an iterable in a progress bar on stderr."""
    return lambda items: tqdm(
        items, description, total=total, unit=unit, file=sys.stderr, disable=None
    )


def _print_error(line: str) -> None:
    """Print to stderr without breaking a progress bar."""
    tqdm.write(one_line(line), file=sys.stderr)


def _scenes(arguments: argparse.Namespace) -> int:
    from multimodal.scenes.dataset import write_scenes

    write_scenes(arguments.out, arguments.count, arguments.seed, arguments.size)
    manifest = read_manifest(arguments.out)
    count = sum(entry["samples"] for entry in manifest["shards"])
    print(f"{arguments.out}: {len(manifest['shards'])} shards, {count:,} samples")
    return 0
