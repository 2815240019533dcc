"""``multimodal embed``: images or texts as rows of unit norm, beside an index of them."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal.commands.options import (
    add_bulk,
    at_least_one,
    check_output,
    image_paths,
    load_model,
    make_parser,
    run_bulk,
    stdin_bytes,
)
from multimodal.files import atomic_file, decode_text, lines_of, read_text
from multimodal.terminal import print_error

if TYPE_CHECKING:
    from torch import Tensor

EPILOG = """FILE.npy holds float32 rows of unit norm, FILE.jsonl one object a row in the same order:
{"image": PATH} or {"text": LINE}. A file that cannot be read, or that is no image in a folder, and
a line that is empty or too long, is named on stderr, has no row, and the exit status is 1. The
product of two rows says how well they fit, in [-1, 1].

examples:
  multimodal embed photos/ --out photos.npy
  multimodal embed a.jpg b.jpg --out two.npy
  multimodal embed --text lines.txt --out lines.npy
  multimodal embed --data data/photos --out-dir rows/ --workers 4
  torchrun --nproc-per-node 8 -m multimodal.cli embed photos/ --out photos.npy
"""


def main(argv: list[str]) -> int:
    parser = make_parser(
        "embed", "Turn images, or lines of text, into vectors of one space.", EPILOG
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files, or folders with images")
    parser.add_argument("--text", metavar="FILE", help="a text a line; - reads stdin")
    parser.add_argument("--out", type=Path, metavar="FILE.npy")
    parser.add_argument("--batch-size", type=int, default=32, help="at once (default 32)")
    add_bulk(parser)
    arguments = parser.parse_args(argv)
    if sum(map(bool, (arguments.images, arguments.text, arguments.data))) != 1:
        parser.error("give images, or --text FILE, or --data DIR: one of them")
    if not arguments.data and (arguments.out_dir or arguments.split):
        parser.error("--out-dir and --split go with --data")
    if arguments.data and arguments.out:
        parser.error("--out is for images or --text; with --data the results go to --out-dir")
    at_least_one(arguments, "batch_size")
    if arguments.data:
        return run_bulk(arguments, "embed")
    if arguments.out is None:
        parser.error("the following arguments are required: --out")
    check_output(arguments.out, (".npy",))

    import numpy as np
    import torch
    from tqdm import tqdm

    from multimodal.distributed import SharedWork

    rows: list[Tensor] = []
    index: list[dict[str, str]] = []
    size = arguments.batch_size
    with SharedWork() as shared:
        if arguments.text:
            items, failed = shared.from_first(lambda: (_lines(arguments.text), 0))
        else:
            items, failed = shared.from_first(lambda: image_paths("embed", arguments.images))
        model = load_model(arguments)

        def work(batch: Sequence[str], first: int) -> "Iterable[Tensor | ValueError]":
            if arguments.text:
                return model.embed_lines(batch, batch_size=size)
            return (row for _, row in model.embed_files(list(map(Path, batch)), batch_size=size))

        kind, unit = ("text", "line") if arguments.text else ("image", "image")
        embedded = shared.map_batches(items, size, work)
        hidden = None if shared.is_first else True
        for number, row in enumerate(
            tqdm(embedded, total=len(items), unit=unit, file=sys.stderr, disable=hidden)
        ):
            if isinstance(row, ValueError):
                failed += 1
                # An error of a file names it.
                where = f"{arguments.text}: line {number + 1}: " if arguments.text else ""
                print_error(f"multimodal embed: error: {where}{row}")
            else:
                rows.append(row)
                index.append({kind: items[number]})
    if not shared.is_first:
        return 0
    if not rows:
        raise ValueError("nothing could be embedded")
    with atomic_file(arguments.out) as part, part.open("wb") as file:
        np.save(file, torch.stack(rows).numpy())
    beside = arguments.out.with_suffix(".jsonl")
    with atomic_file(beside) as part:
        part.write_text("".join(json.dumps(item) + "\n" for item in index), "utf-8")
    print(f"{arguments.out}: {len(rows)} rows of {len(rows[0])}; index in {beside}")
    return int(failed > 0)


def _lines(name: str) -> list[str]:
    lines = lines_of(decode_text(stdin_bytes()) if name == "-" else read_text(name))
    if not lines:
        raise ValueError(f"{name}: no lines in it")
    return lines
