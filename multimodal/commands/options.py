"""What the verbs that use a model share: parsers made of the options, loading, output files."""

import argparse
import math
import os
import sys
import time
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from multimodal.devices import DTYPES
from multimodal.files import atomic_file, local_path, read_bytes
from multimodal.options import CaptionOptions, Sampling
from multimodal.terminal import Parser, print_error

if TYPE_CHECKING:
    from PIL import Image

    from multimodal.api import Model
    from multimodal.origin.credentials import Drawing, Signer

MAX_THREADS = 1024
STATUS_INTERVAL = 60.0  # seconds
Item = TypeVar("Item")
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def make_parser(
    verb: str,
    about: str,
    epilog: str,
    options: type[Sampling] | None = None,
    adapters: bool = False,
) -> argparse.ArgumentParser:
    """A parser with what every verb that uses a model has: the model, and where it runs.

    Args:
        options: add every field of this options class.
        adapters: --adapter may be given several times, with names.
    """
    parser = Parser(
        prog=f"multimodal {verb}",
        description=about,
        epilog=epilog,
    )
    parser.add_argument(
        "--model",
        default="starter",
        metavar="MODEL",
        help="a folder, a bundled model, or user/name[@revision] of the Hugging Face Hub "
        "(default starter)",
    )
    add_adapter(parser, adapters)
    add_device(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the network (default auto: bfloat16 on a GPU that has it, else float32)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice)"
    )
    parser.add_argument(
        "--urls", action="store_true", help="images may be http and https addresses: fetch them"
    )
    if options is not None:
        add_options(parser, options)
    return parser


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default 0)")


def add_options(parser: argparse.ArgumentParser, options: type[Sampling]) -> None:
    """Add every field of an options class.

    What is not given on the command line is not in the parsed arguments: defaults are those of the
    class, or of a prompt file.
    """
    hints = typing.get_type_hints(options)
    for item in fields(options):
        kind, default = hints[item.name], item.default
        text = str(item.metadata["help"])
        how: dict[str, Any] = {"metavar": item.metadata["metavar"]}
        if typing.get_origin(kind) is Literal:
            how["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:
            how["action"] = "append"
            text += "; may be given several times"
        else:
            (how["type"],) = (
                [one for one in typing.get_args(kind) if one is not type(None)]
                if isinstance(kind, types.UnionType)
                else [kind]
            )
        if default not in ((), None):
            text += (
                f" (default {default:g})"
                if isinstance(default, float)
                else (f" (default {default})")
            )
        flag = f"--{item.name.replace('_', '-')}"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def given_options(arguments: argparse.Namespace, options: type[Sampling]) -> dict[str, Any]:
    """The options that were given on the command line.

    Raises:
        ValueError: for a value out of range, before a model is loaded.
    """
    parsed = vars(arguments)
    given = {item.name: parsed[item.name] for item in fields(options) if item.name in parsed}
    try:
        options(**given)
    except ValueError as error:  # NAME=VALUE is how Python says it
        name, equals, rest = str(error).partition("=")
        if equals and name in given:
            raise ValueError(f"--{name.replace('_', '-')} {rest}") from error
        raise
    return given


def add_adapter(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add --adapter. several: it may be given several times, with names."""
    about = "what a run with LoRA has written for this model"
    if several:
        about += ", as a model of its own; several times for several (default name: the folder's)"
        parser.add_argument("--adapter", metavar="NAME=DIR", action="append", help=about)
    else:
        parser.add_argument("--adapter", metavar="DIR", help=about)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        help="where torch computes: cuda, cuda:1, mps, cpu (default auto: the first that works)",
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Options of verbs that work shard by shard. Under torchrun its ranks share the work, too."""
    parser.add_argument("--workers", type=int, default=1, help="processes at work (default 1)")
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="workers are processes, or tasks of Ray: same result",
    )


def add_bulk(parser: argparse.ArgumentParser) -> None:
    """Options of verbs that take a whole shard folder instead of files."""
    bulk = parser.add_argument_group(
        "shards",
        "a result for each shard; what is there already stays. Each process computes with one "
        "thread, or --threads: more --workers are faster, and change no byte",
    )
    bulk.add_argument("--data", type=Path, metavar="DIR", help="a shard folder, not files")
    bulk.add_argument("--out-dir", type=Path, metavar="DIR", help="the folder of the results")
    bulk.add_argument("--split", help="of the shard folder; by default all of it")
    add_engine(parser)


def add_index(parser: argparse.ArgumentParser, use: str, retrieve: int) -> None:
    """Options of verbs that put what an index has into the prompt."""
    group = parser.add_argument_group("an index", f"what was found in it will {use}")
    group.add_argument("--index", type=Path, metavar="DIR", help="what multimodal index wrote")
    group.add_argument(
        "--retrieve",
        type=int,
        default=retrieve,
        metavar="K",
        help=f"the K nearest, as far as they fit into the prompt (default {retrieve})",
    )


def run_bulk(arguments: argparse.Namespace, kind: Literal["caption", "embed"]) -> int:
    """Run the job that ``add_bulk``'s options ask for. Returns 1 if an image failed, else 0."""
    import torch
    from tqdm import tqdm

    from multimodal.data.shards import Shards
    from multimodal.inference.shard_jobs import Job, run_job

    if arguments.out_dir is None:
        raise ValueError("--data: give --out-dir, a folder for the results")
    options = CaptionOptions()
    if kind == "caption":
        options = CaptionOptions(**given_options(arguments, CaptionOptions))
    use_device(arguments)
    # One thread in each process, or as many as were asked for, however many processes there are:
    # the last bits of a sum depend on it.
    torch.set_num_threads(arguments.threads or 1)
    job = Job(
        kind,
        arguments.model,
        arguments.device,
        arguments.dtype,
        arguments.batch_size,
        options,
        arguments.threads or 1,
        arguments.adapter,
    )
    total = len(Shards(arguments.data, arguments.split))
    with tqdm(total=total, unit="image", file=sys.stderr, disable=None) as bar:
        counts = run_job(
            job,
            arguments.data,
            arguments.out_dir,
            arguments.split,
            arguments.engine,
            arguments.workers,
            bar.update,
        )
    if counts is None:  # the first rank reports
        return 0
    done, failed = counts
    unread = f"; {failed:,} could not be read, see the lines with an error" if failed else ""
    print(f"{arguments.out_dir}: {done:,} of {done + failed:,} images{unread}")
    return int(failed > 0)


def image_paths(verb: str, names: "Sequence[str]") -> tuple[list[str], int]:
    """The paths of images that arguments stand for, and how many files are skipped.

    What is skipped, a file of a folder that is no image or a folder without images, is named on
    stderr.

    Args:
        verb: the command, for messages.
        names: paths of images, folders (their images, subfolders too), ``@FILE`` for a file with a
            path a line, ``-`` for such lines on stdin.

    Raises:
        ValueError: for a list that cannot be read or is empty.
    """
    from multimodal.data.formats.folders import list_images

    paths: list[str] = []
    skipped = 0
    for name in names:
        if os.path.isdir(name):
            try:
                found = list_images(name)
            except ValueError as error:  # other paths may be good
                print_error(f"multimodal {verb}: error: {error}")
                skipped += 1
                continue
            paths += map(str, found.files)
            skipped += len(found.skipped)
            for complaint in found.complaints():
                print_error(f"multimodal {verb}: {complaint}")
        elif name == "-" or (name.startswith("@") and not os.path.exists(name)):
            listed = _lines_of(name)
            if not listed:
                raise ValueError(f"{'stdin' if name == '-' else name[1:]}: no paths in it")
            paths += listed
        else:
            paths.append(name)
    return paths, skipped


def stdin_bytes() -> bytes:
    """All that comes on stdin."""
    return sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()


def _lines_of(name: str) -> list[str]:
    """The lines of stdin (``-``) or of a file (``@FILE``) that are not empty."""
    data = stdin_bytes() if name == "-" else read_bytes(name[1:])
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, as PowerShell writes lists
        data = data.decode("utf-16", "replace").encode()
    # Paths are bytes: what is not UTF-8 comes through as it is.
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]


def at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ``ValueError`` for an option below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            option = name if len(name) == 1 else f"-{name.replace('_', '-')}"
            raise ValueError(f"-{option} {getattr(arguments, name)}: expected at least 1")


def use_device(arguments: argparse.Namespace) -> None:
    """Set the number of threads. Put the device and dtype that are meant in place of ``auto``.

    Raises:
        ValueError: for a device that cannot be used.
    """
    import torch

    from multimodal.devices import choose_device, choose_dtype

    if not 0 <= arguments.threads <= MAX_THREADS:
        raise ValueError(
            f"--threads {arguments.threads}: expected 1 to {MAX_THREADS:,}, or 0: torch's choice"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        device = choose_device(arguments.device)
    except ValueError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise ValueError(f"--device {arguments.device:.80}: {reason}") from error
    arguments.device = str(device)
    if "dtype" in arguments:
        arguments.dtype = str(choose_dtype(arguments.dtype, device)).removeprefix("torch.")


def load_model(arguments: argparse.Namespace) -> "Model":
    """The model of the options. Raises ``ValueError`` for a device or a folder that is none."""
    from multimodal import load

    use_device(arguments)
    return load(
        arguments.model,
        arguments.device,
        arguments.dtype,
        adapter=arguments.adapter,
        urls=arguments.urls,
    )


def check_output(path: Path, suffixes: tuple[str, ...] = tuple(IMAGE_FORMATS)) -> None:
    """Before the work: can this be written? Raises ``ValueError`` that says why not."""
    path = local_path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent}: cannot be written to")


def save_image(
    image: "Image.Image",
    path: Path,
    signer: "Signer | None" = None,
    drawing: "Drawing | None" = None,
) -> None:
    """Save an image; with a signer, its credentials say what ``drawing`` says."""
    kind = IMAGE_FORMATS[path.suffix.lower()]
    with atomic_file(path) as part:
        if signer is None or drawing is None:
            image.save(part, format=kind)
        else:
            part.write_bytes(signer.sign(image, kind, drawing))


def numbered(path: Path, number: int) -> Path:
    """``NAME-NUMBER.SUFFIX``."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def with_progress(items: Iterable[Item], total: int, name: str, unit: str) -> Iterator[Item]:
    """The items. Meanwhile say how far it is: a bar in a terminal, else a line every minute.

    The first line comes with the first item, if the rest will take more than a minute.
    """
    from tqdm import tqdm

    if sys.stderr is not None and sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=unit, file=sys.stderr, disable=total == 1)
        return
    start, said = time.monotonic(), -math.inf
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        rest = (total - done) * (now - start) / done
        if rest > STATUS_INTERVAL and now - said > STATUS_INTERVAL:
            said = now
            print_error(f"{name}: {done:,} of {total:,} {unit}, about {_duration(rest)} to go")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def save_images(images: "Sequence[Image.Image]", path: Path) -> list[Path]:
    """Save one image as ``path``, or several with -0, -1, ... before the suffix."""
    paths = [path]
    if len(images) > 1:
        paths = [numbered(path, n) for n in range(len(images))]
    for image, each in zip(images, paths, strict=True):
        save_image(image, each)
    return paths
