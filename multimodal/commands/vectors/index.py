"""``multimodal index``: embed many images or texts once, to search them in milliseconds."""

from pathlib import Path

from multimodal.commands.options import at_least_one, load_model, make_parser, with_progress
from multimodal.terminal import print_error

EPILOG = """SOURCE is a folder of images, whose captions stand in .txt or .json files beside them, a
folder of text files (.txt, .md, .rst), which are cut into pieces, or a shard folder. Run it again
after changes: what is new is added, what has changed is replaced, what is gone is removed, and the
rest is not computed again. Several folders can go into one index, one after the other. What cannot
be read is named on stderr and left out, and the exit status is 1. Needs: pip install
multimodal[index].

examples:
  multimodal index photos/ photos.index
  multimodal search "a dog in the snow" --index photos.index -k 5
  multimodal index data/photos photos.index --split train
  multimodal index docs/ docs.index --piece-tokens 128
  multimodal answer "who made it?" --index docs.index --retrieve 3
"""


def main(argv: list[str]) -> int:
    parser = make_parser("index", "Embed many images or texts once, to search them.", EPILOG)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a folder, or a shard folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the index")
    parser.add_argument(
        "--kind",
        choices=("auto", "images", "texts"),
        default="auto",
        help="of files (default auto: images if there are any, else texts)",
    )
    parser.add_argument("--split", help="of a shard folder; by default all of it")
    parser.add_argument(
        "--piece-tokens", type=int, default=64, help="the longest piece of a text (default 64)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="at once (default 32)")
    arguments = parser.parse_args(argv)
    at_least_one(arguments, "batch_size", "piece_tokens")

    from multimodal.index.index import Index

    index = Index.open(arguments.out, load_model(arguments), create=True)
    changes = index.add(
        arguments.source,
        kind=arguments.kind,
        split=arguments.split,
        piece_tokens=arguments.piece_tokens,
        batch_size=arguments.batch_size,
        on_problem=lambda problem: print_error(f"multimodal index: {problem}"),
        progress=lambda items, total: with_progress(items, total, "multimodal index", "items"),
    )
    left_out = f", {changes.problems:,} left out" if changes.problems else ""
    print(
        f"{arguments.out}: {len(index):,} entries; files or samples: {changes.added:,} added, "
        f"{changes.replaced:,} replaced, {changes.removed:,} removed, "
        f"{changes.unchanged:,} as before{left_out}"
    )
    return int(changes.problems > 0)
