"""``multimodal caption``: describe images in words, one line an image.

Images are decoded a batch at a time, and each batch is printed as soon as it is done: neither
memory nor the wait for the first line depends on how many images there are.
"""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from multimodal.cli import print_error
from multimodal.commands.options import (
    add_bulk,
    add_sampling,
    at_least_one,
    load_model,
    parser,
    run_bulk,
    sampling_of,
)

if TYPE_CHECKING:
    from multimodal.inference.sampling import Sampling
    from multimodal.model.network import Multimodal

EPILOG = """A file that cannot be read is named on stderr, the others are done, and the exit status
is 1. Paths are printed as given: use --json where one may hold a tab or a line break (there a path
that is not UTF-8 reads as Python's surrogateescape has it).

examples:
  multimodal caption --model runs/photos-joint/model cat.jpg dog.png
  multimodal caption --model runs/photos-joint/model --json photos/*.jpg > captions.jsonl
  multimodal caption --data data/photos --out-dir captions/ --workers 4
"""


def main(argv: list[str]) -> int:
    """Run ``multimodal caption ARGV...``; returns the exit status: 1 if an image failed."""
    made = parser(
        "caption",
        "Describe images in words: PATH<TAB>CAPTION on stdout, in the order given.",
        EPILOG,
    )
    made.add_argument("images", nargs="*", metavar="IMAGE", help="JPEG, PNG or WebP files")
    made.add_argument("--json", action="store_true", help='{"image": ..., "caption": ...} a line')
    made.add_argument("--batch-size", type=int, default=32, help="images at once (default 32)")
    made.add_argument("--max-tokens", type=int, default=64, help="longest caption (default 64)")
    add_sampling(made, 0.0, texts=True)
    add_bulk(made)
    arguments = made.parse_args(argv)
    if bool(arguments.images) == bool(arguments.data):
        made.error("give images, or --data and --out-dir: one of the two")
    at_least_one(arguments, "batch_size", "max_tokens")
    if arguments.data:
        return run_bulk(arguments, "caption")
    sampling = sampling_of(arguments)
    model = load_model(arguments)
    failed = 0
    for path, caption in caption_files(
        model,
        arguments.images,
        arguments.batch_size,
        arguments.max_tokens,
        sampling,
        arguments.stop,
    ):
        if isinstance(caption, ValueError):
            failed += 1
            print_error(f"multimodal caption: error: {caption}")
        else:
            print(line(path, caption, as_json=arguments.json), flush=True)
    return int(failed > 0)


def caption_files(
    model: "Multimodal",
    paths: list[str],
    batch_size: int,
    max_tokens: int,
    sampling: "Sampling",
    stop: list[str],
) -> Iterator[tuple[str, str | ValueError]]:
    """(path, its caption or what was wrong with the file), in the order of the paths."""
    import torch
    from tqdm import tqdm

    from multimodal.inference.text import caption_codes, encode_images, read_images

    starts = range(0, len(paths), batch_size)
    # None: no bar where stderr is not a terminal.
    hidden = True if len(starts) == 1 else None
    with tqdm(total=len(paths), unit="image", file=sys.stderr, disable=hidden) as bar:
        for start in starts:
            batch = paths[start : start + batch_size]
            codes, numbers, errors = [], [], {}
            for i, path in enumerate(batch):
                try:
                    codes.append(encode_images(model, read_images(model, [path])))
                    numbers.append(start + i)
                except ValueError as error:
                    errors[i] = error
            together = torch.cat(codes) if codes else torch.zeros(0, 0, dtype=torch.int64)
            captions = iter(caption_codes(model, together, max_tokens, sampling, numbers, stop))
            bar.clear()  # or the lines of the caller would run into it
            for i, path in enumerate(batch):
                yield path, errors[i] if i in errors else next(captions)
            bar.update(len(batch))


def line(path: str, caption: str, *, as_json: bool) -> str:
    """One line of output: a line break or a tab of the caption must not look like the format's."""
    if as_json:
        return json.dumps({"image": path, "caption": caption})
    return f"{path}\t{' '.join(caption.replace(chr(9), ' ').splitlines())}"
