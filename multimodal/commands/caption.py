"""``multimodal caption``: describe images in words, one line an image.

Each batch is printed as soon as it is done. So neither memory nor the wait for the first line
depends on how many images there are.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from multimodal.commands.options import (
    add_bulk,
    add_index,
    at_least_one,
    given_options,
    image_paths,
    load_model,
    make_parser,
    run_bulk,
)
from multimodal.options import CaptionOptions
from multimodal.terminal import print_error

EPILOG = """A file that cannot be read, or that is no image in a folder, is named on stderr, the
others are done, and the exit status is 1. Paths are printed as given: use --json where one may hold
a tab or a line break (there a path that is not UTF-8 reads as Python's surrogateescape has it).

examples:
  multimodal caption --model runs/photos-joint/model cat.jpg dog.png
  multimodal caption --model runs/photos-joint/model --json photos/*.jpg > captions.jsonl
  multimodal caption photos/ > captions.tsv
  find photos -name "*.jpg" | multimodal caption -
  multimodal caption @list.txt
  multimodal caption photos/ --index others.index
  multimodal caption --data data/photos --out-dir captions/ --workers 4
  torchrun --nproc-per-node 8 -m multimodal.cli caption photos/ > captions.tsv
"""


def main(argv: list[str]) -> int:
    """Run ``multimodal caption ARGV...``. Returns the exit status: 1 if an image failed."""
    parser = make_parser(
        "caption",
        "Describe images in words: PATH<TAB>CAPTION on stdout, in the order given.",
        EPILOG,
        CaptionOptions,
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="files, folders, @FILE with a path a line, or - for such lines on stdin",
    )
    parser.add_argument("--json", action="store_true", help='{"image": ..., "caption": ...} a line')
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (default 32)")
    add_bulk(parser)
    add_index(parser, "stand before the image as examples: images with captions", retrieve=4)
    arguments = parser.parse_args(argv)
    if bool(arguments.images) == bool(arguments.data):
        parser.error("give images, or --data and --out-dir: one of the two")
    if not arguments.data and (arguments.out_dir or arguments.split):
        parser.error("--out-dir and --split go with --data")
    at_least_one(arguments, "batch_size", "retrieve")
    if arguments.data and arguments.index:
        parser.error("--index is for images, not for --data")
    if arguments.data:
        return run_bulk(arguments, "caption")

    from tqdm import tqdm

    from multimodal.distributed import SharedWork

    options = given_options(arguments, CaptionOptions)
    size = arguments.batch_size
    with SharedWork() as shared:
        paths, failed = shared.from_first(lambda: image_paths("caption", arguments.images))
        model = load_model(arguments)
        each: Any = model.caption_each
        if arguments.index is not None:
            from multimodal.index.index import Index

            index = Index.open(arguments.index, model)
            each = partial(index.caption_each, retrieve=arguments.retrieve)

        def work(batch: Sequence[str], first: int) -> Iterable[str | ValueError]:
            results: Iterable[str | ValueError] = each(
                batch, batch_size=size, first=first, **options
            )
            return results

        captions = shared.map_batches(paths, size, work)
        # None: no bar where stderr is not a terminal.
        hidden = True if len(paths) <= size or not shared.is_first else None
        with tqdm(total=len(paths), unit="image", file=sys.stderr, disable=hidden) as bar:
            for path, caption in zip(paths, captions, strict=shared.is_first):
                bar.clear()  # or the line would run into it
                if isinstance(caption, ValueError):
                    failed += 1
                    print_error(f"multimodal caption: error: {caption}")
                else:
                    print(line(path, caption, as_json=arguments.json), flush=True)
                bar.update()
    return int(failed > 0 and shared.is_first)


def line(path: str, caption: str, *, as_json: bool) -> str:
    """One line of output. A line break or a tab of the caption must not look like the format's."""
    if as_json:
        return json.dumps({"image": path, "caption": caption})
    return f"{path}\t{' '.join(caption.replace(chr(9), ' ').splitlines())}"
