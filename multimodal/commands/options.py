"""What the verbs that use a model share: options, loading, checks of the output."""

import argparse
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from multimodal.files import atomic_file

if TYPE_CHECKING:
    from PIL import Image

    from multimodal.inference.sampling import Sampling
    from multimodal.model.network import Multimodal

DTYPES = ("float32", "bfloat16")
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DRAWN_AT = 0.8  # temperature: that of multimodal.inference.drawing.DRAWN, which would import torch


def parser(verb: str, about: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the options of every verb that uses a model."""
    made = argparse.ArgumentParser(
        prog=f"multimodal {verb}",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--model",
        default="starter",
        metavar="DIR",
        help="a model folder, or the name of a bundled one (default starter)",
    )
    made.add_argument("--device", default="cpu", help="where torch computes (default cpu)")
    made.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the transformer (default float32)"
    )
    made.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    made.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's choice)"
    )
    return made


def add_sampling(made: argparse.ArgumentParser, temperature: float, texts: bool = False) -> None:
    """texts: of a verb that writes texts."""
    made.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help=f"0 takes the likeliest token (default {temperature:g})",
    )
    made.add_argument("--top-k", type=int, default=0, help="of the k likeliest only (default all)")
    made.add_argument(
        "--top-p", type=float, default=1.0, help="of the likeliest with this share (default 1)"
    )
    made.add_argument("--min-p", type=float, default=0.0, metavar="P",
                      help="of those at least P times as likely as the likeliest")  # fmt: skip
    if texts:
        made.add_argument("--beams", type=int, default=1,
                          help="follow so many texts at once (default 1: greedy)")  # fmt: skip
        made.add_argument("--stop", action="append", default=[], metavar="TEXT",
                          help="end before this text; may be given several times")  # fmt: skip
        made.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X",
                          help="more than 1: fewer words twice (default 1)")  # fmt: skip


def add_engine(made: argparse.ArgumentParser) -> None:
    """Of verbs that work shard by shard; under torchrun, its ranks share the work besides."""
    made.add_argument("--workers", type=int, default=1, help="processes at work (default 1)")
    made.add_argument("--engine", choices=("processes", "ray"), default="processes",
                      help="workers are processes, or tasks of Ray: same result")  # fmt: skip


def add_bulk(made: argparse.ArgumentParser) -> None:
    """Of verbs that take a whole shard folder in the place of files."""
    bulk = made.add_argument_group("shards", "a result for each shard; what is there already stays")
    bulk.add_argument("--data", type=Path, metavar="DIR", help="a shard folder, not files")
    bulk.add_argument("--out-dir", type=Path, metavar="DIR", help="the folder of the results")
    bulk.add_argument("--split", help="of the shard folder; by default all of it")
    add_engine(made)


def run_bulk(arguments: argparse.Namespace, kind: "Literal['caption', 'embed']") -> int:
    """Do what ``add_bulk``'s options ask for; returns the exit status, 1 if an image failed."""
    import sys

    import torch
    from tqdm import tqdm

    from multimodal.data.shards import Shards
    from multimodal.inference.shard_jobs import Job, run_job

    if arguments.out_dir is None:
        raise ValueError("--data: give --out-dir, a folder for the results")
    use_device(arguments)
    job = Job(kind, arguments.model, arguments.device, arguments.dtype, arguments.batch_size)
    if arguments.workers > 1 or arguments.engine != "processes":
        job = replace(job, threads=max(1, torch.get_num_threads() // arguments.workers))
    if kind == "caption":
        job = replace(job, max_tokens=arguments.max_tokens, sampling=sampling_of(arguments),
                      stop=tuple(arguments.stop))  # fmt: skip
    total = len(Shards(arguments.data, arguments.split))
    with tqdm(total=total, unit="image", file=sys.stderr, disable=None) as bar:
        counts = run_job(job, arguments.data, arguments.out_dir, arguments.split,
                         arguments.engine, arguments.workers, bar.update)  # fmt: skip
    if counts is None:  # the first rank says it
        return 0
    done, failed = counts
    unread = f"; {failed:,} could not be read, see the lines with an error" if failed else ""
    print(f"{arguments.out_dir}: {done:,} of {done + failed:,} images{unread}")
    return int(failed > 0)


def add_drawing(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--guidance-scale",
        type=float,
        default=3.0,
        help="how strictly to follow the text: u + SCALE * (c - u); 1 is no guidance (default 3)",
    )
    made.add_argument("--guidance-schedule", choices=("constant", "rising"), default="constant",
                      help="rising: from 1 to 2 SCALE - 1 (default constant)")  # fmt: skip
    made.add_argument("--negative", metavar="TEXT", help="what to lead away from")
    made.add_argument(
        "--steps", type=int, default=12, help="of masked drawing; fewer is faster (default 12)"
    )


def at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    """Errors: ``ValueError`` for an option below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            option = name if len(name) == 1 else f"-{name.replace('_', '-')}"
            raise ValueError(f"-{option} {getattr(arguments, name)}: expected at least 1")


def sampling_of(arguments: argparse.Namespace) -> "Sampling":
    from multimodal.inference.sampling import Sampling

    given = vars(arguments)
    return Sampling(**{one.name: given[one.name] for one in fields(Sampling) if one.name in given})


def drawing_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``Multimodal.draw`` and ``edit`` share."""
    names = ("steps", "guidance_scale", "guidance_schedule", "negative", "temperature", "top_k",
             "top_p", "min_p", "seed")  # fmt: skip
    return {name: getattr(arguments, name) for name in names}


def use_device(arguments: argparse.Namespace) -> None:
    """Set the threads and try the device. Errors: ``ValueError`` for one that cannot be used."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and "LOCAL_RANK" in os.environ:
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: a GPU for each
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # CPU-only builds assert
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--device {arguments.device}: cannot be used here ({reason})") from error


def load_model(arguments: argparse.Namespace) -> "Multimodal":
    """The model of the options. Errors: ``ValueError`` for a device or a folder that is none."""
    import torch

    from multimodal.model.checkpoint import load

    use_device(arguments)
    return load(arguments.model, arguments.device, getattr(torch, arguments.dtype))


def check_output(path: Path, suffixes: tuple[str, ...] = tuple(IMAGE_FORMATS)) -> None:
    """Before the work: can this be written? Errors: ``ValueError`` that says why not."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent}: cannot be written to")


def save_image(image: "Image.Image", path: Path) -> None:
    with atomic_file(path) as part:
        image.save(part, format=IMAGE_FORMATS[path.suffix.lower()])
