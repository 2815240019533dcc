"""``multimodal caption``: describe images in words, one line an image.

Images are decoded a batch at a time, and each batch is printed as soon as it is done: neither
memory nor the wait for the first line depends on how many images there are.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal.cli import print_error

if TYPE_CHECKING:
    from multimodal.model import Multimodal

DTYPES = ("float32", "bfloat16")
EPILOG = """A file that cannot be read is named on stderr, the others are done, and the exit status
is 1. Paths are printed as given: use --json where one may hold a tab or a line break (there a path
that is not UTF-8 reads as Python's surrogateescape has it).

examples:
  multimodal caption --model runs/photos-joint/model cat.jpg dog.png
  multimodal caption --model runs/photos-joint/model --json photos/*.jpg > captions.jsonl
"""


def main(argv: list[str]) -> int:
    """Run ``multimodal caption ARGV...``; returns the exit status: 1 if an image failed."""
    arguments = _parser().parse_args(argv)
    for name in ("batch_size", "max_tokens"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(arguments, name)}: expected at least 1")

    import torch  # after the arguments: wrong usage need not wait for it

    from multimodal.model import load

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = load(arguments.model, _device(arguments.device), getattr(torch, arguments.dtype))
    failed = 0
    for path, caption in caption_files(
        model, arguments.images, arguments.batch_size, arguments.max_tokens
    ):
        if isinstance(caption, ValueError):
            failed += 1
            print_error(f"multimodal caption: error: {caption}")
        else:
            print(line(path, caption, as_json=arguments.json), flush=True)
    return int(failed > 0)


def caption_files(
    model: "Multimodal", paths: list[str], batch_size: int, max_tokens: int
) -> Iterator[tuple[str, str | ValueError]]:
    """(path, its caption or what was wrong with the file), in the order of the paths."""
    import torch
    from tqdm import tqdm

    from multimodal.generation import caption_pixels, read_images

    starts = range(0, len(paths), batch_size)
    # None: no bar where stderr is not a terminal.
    hidden = True if len(starts) == 1 else None
    with tqdm(total=len(paths), unit="image", file=sys.stderr, disable=hidden) as bar:
        for start in starts:
            batch = paths[start : start + batch_size]
            pixels, errors = [], {}
            for i, path in enumerate(batch):
                try:
                    pixels.append(read_images(model, [path]))
                except ValueError as error:
                    errors[i] = error
            captions = iter(caption_pixels(model, torch.cat(pixels), max_tokens) if pixels else ())
            bar.clear()  # or the lines of the caller would run into it
            for i, path in enumerate(batch):
                yield path, errors[i] if i in errors else next(captions)
            bar.update(len(batch))


def line(path: str, caption: str, *, as_json: bool) -> str:
    """One line of output: a line break or a tab of the caption must not look like the format's."""
    if as_json:
        return json.dumps({"image": path, "caption": caption})
    return f"{path}\t{' '.join(caption.replace(chr(9), ' ').splitlines())}"


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # CPU-only builds assert
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason})") from error
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="multimodal caption",
        description="Describe images in words: PATH<TAB>CAPTION on stdout, in the order given.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP files")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model folder")
    parser.add_argument("--json", action="store_true", help='{"image": ..., "caption": ...} a line')
    parser.add_argument("--device", default="cpu", help="where torch computes (default cpu)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the transformer (default float32)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="unused by greedy captions, as elsewhere"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (default 32)")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest caption (default 64)")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice)"
    )
    return parser
