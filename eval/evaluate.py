"""``multimodal eval``: measures what a model can do, and how each score was measured."""

import argparse
import json
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.commands.options import add_seed, check_output, load_model, make_parser
from multimodal.commands.vectors.search import default_cache
from multimodal.data.shards import Shards
from multimodal.energy import GRAMS_PER_KWH, WATTS_PER_CORE, EnergyMeter, EnergyOptions
from multimodal.eval.tasks.registry import EVALUATORS, find_evaluator
from multimodal.files import address_of, atomic_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from multimodal.api import Model
    from multimodal.data.samples import Sample
    from multimodal.eval.evaluator import Evaluator
    from multimodal.eval.metrics.clip_score import ClipScore
    from multimodal.eval.page import Section

TASKS = tuple(EVALUATORS)
EPILOG = f"""TASK is one of
{textwrap.fill(", ".join(TASKS), 78, initial_indent="  ", subsequent_indent="  ")},
or all, or FILE.py:CLASS, an evaluator of yours (docs/guides/evaluation.md). A task is skipped for a
folder if no sample has what it needs (captions, questions, classes, a scene). Intervals are 95 %,
by the bootstrap over samples. Under torchrun, ranks share the samples. Nothing is downloaded.
Captions are compared with what the split "train" of the same folder gives without a model.

examples:
  multimodal eval all --data data/scenes --limit 200 --output results.json --page results.html
  multimodal eval captioning retrieval --model runs/photos-joint/model --data data/flickr8k
  multimodal eval mine.py:Colours --data data/scenes
"""
SHOWN = 8  # best, worst and random examples on the page


def main(argv: list[str]) -> int:
    options = make_parser("eval", "Measure what a model can do.", EPILOG)
    options.add_argument("tasks", nargs="+", metavar="TASK")
    options.add_argument("--data", type=Path, nargs="+", required=True, help="shard folders")
    options.add_argument("--split", default="val", help="of the folders (default val)")
    options.add_argument(
        "--limit", type=int, default=1000, help="most samples of each folder, the first ones"
    )
    options.add_argument("--batch-size", type=int, default=32)
    add_seed(options)
    options.add_argument(
        "--cache",
        metavar="DIR",
        help='where features of images are kept; "" for nowhere (default: as for search)',
    )
    options.add_argument(
        "--clip",
        metavar="MODEL=FILE",
        help="an open_clip model and its weights (safetensors), to score drawings by CLIPScore",
    )
    options.add_argument(
        "--watts-per-core",
        type=float,
        default=WATTS_PER_CORE,
        help="of the estimate of energy, where no counter can be read (default %(default)g)",
    )
    options.add_argument(
        "--grams-per-kwh",
        type=float,
        default=GRAMS_PER_KWH,
        help="CO2 of your electricity (default %(default)g, the world in 2023)",
    )
    options.add_argument("--output", type=Path, help="a JSON file for the results")
    options.add_argument(
        "--page", type=Path, help="an HTML file with the best, the worst and random samples"
    )
    arguments = options.parse_args(argv)
    for task in arguments.tasks:
        if task not in (*TASKS, "all") and ":" not in task:
            options.error(f"TASK {task}: expected {', '.join(TASKS)}, all, or FILE.py:CLASS")
    if arguments.limit < 1 or arguments.batch_size < 1:
        raise ValueError(
            f"--limit {arguments.limit}, --batch-size {arguments.batch_size}: expected at least 1"
        )
    EnergyOptions(arguments.watts_per_core, arguments.grams_per_kwh)  # checks them
    for path, suffix in ((arguments.output, ".json"), (arguments.page, ".html")):
        if path:
            check_output(path, (suffix,))
    shards = {folder: Shards(folder, arguments.split) for folder in arguments.data}
    from multimodal.distributed import process_group  # imports torch

    names = [TASKS if task == "all" else (task,) for task in arguments.tasks]
    tasks = tuple(dict.fromkeys(chain.from_iterable(names)))
    with process_group() as rank:
        report = run(arguments, tasks, shards, is_first=rank == 0)
    failed = int("failed" in report)
    if rank:
        return failed
    print(format_table(report))
    if arguments.output:
        with atomic_file(arguments.output) as file:
            file.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return failed


def _warn(line: str) -> None:
    print(f"multimodal eval: {line}", file=sys.stderr)


def run(
    arguments: argparse.Namespace,
    tasks: tuple[str, ...],
    shards: dict[Path, Shards],
    is_first: bool,
) -> dict[str, Any]:
    """Measure all tasks on all folders.

    Args:
        arguments: of the command line.
        tasks: names or FILE.py:CLASS.
        shards: of each folder.
        is_first: True on the first rank. It shows progress and writes the page.

    Returns:
        The report: the protocol, the results of each folder and task, and ``failed``, the tasks
        that could not be measured and why, if there are any.

    Raises:
        ValueError: if no sample fits any task, if all tasks failed, and for codes of another image
            tokenizer.
    """
    from multimodal.distributed import world_size
    from multimodal.eval.evaluator import training_samples, usable_samples
    from multimodal.eval.metrics.clip_score import ClipScore
    from multimodal.eval.page import page
    from multimodal.inference.shard_jobs import check_codes_fit

    evaluators = {task: find_evaluator(task) for task in tasks}
    clip = ClipScore(arguments.clip) if arguments.clip else None
    model = load_model(arguments)
    for of_folder in shards.values():
        check_codes_fit(model, of_folder)
    results: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    sections: list[Section] = []
    for folder, of_folder in shards.items():
        warn = _warn if is_first else lambda line: None
        limit = min(arguments.limit, len(of_folder))
        folder_samples = list(islice(usable_samples(of_folder, warn, model), limit))
        training = training_samples(folder, arguments.split)
        for task, make_evaluator in evaluators.items():
            evaluator = make_evaluator()
            if getattr(evaluator, "draws", False) and not model.image_tokenizer.can_draw:
                warn(f"{task}: left out, the model has no decoder of images")
                continue
            usable = [sample for sample in folder_samples if evaluator.fits(sample)]
            if not usable:
                continue
            name = address_of(folder) or str(folder)
            title = f"{task}: {name}"
            try:
                result = measure(
                    evaluator, model, usable, training, arguments, clip, title, is_first
                )
            except ValueError as error:
                if world_size() > 1:  # other ranks wait for this one
                    raise
                warn(f"error: {title}: {error}")
                failed.append({"task": task, "data": name, "error": str(error)})
                continue
            results.append({"task": task, "data": name, **result})
            sections.append(section_of(title, result, evaluator, arguments.seed))
    if failed and not results:
        raise ValueError(f"no task could be measured: {failed[0]['error']}")
    if not results:
        raise ValueError(f"no sample of {', '.join(map(str, shards))} fits {', '.join(tasks)}")
    if arguments.page and is_first:
        title = f"{arguments.model} ({model.fingerprint})"
        with atomic_file(arguments.page) as file:
            file.write_text(page(title, f"commit {git_commit()}", sections), "utf-8")
    report = {"protocol": protocol_of(arguments, model, clip), "results": results}
    return {**report, "failed": failed} if failed else report


def measure(
    evaluator: "Evaluator",
    model: "Model",
    samples: "list[Sample]",
    training: "Shards | Sequence[Sample]",
    arguments: argparse.Namespace,
    clip: "ClipScore | None",
    title: str,
    is_first: bool,
) -> dict[str, Any]:
    """The result of one task: number of samples, protocol, scores, notes and cost."""
    from tqdm import tqdm

    from multimodal.eval.evaluator import Subject, evaluate

    energy = EnergyOptions(arguments.watts_per_core, arguments.grams_per_kwh)
    with (
        tqdm(desc=title, file=sys.stderr, disable=None if is_first else True) as bar,
        EnergyMeter(model.device, energy) as meter,
        measure_cost(model.network.transformer.embed_tokens, meter) as cost,
    ):
        cache = default_cache() if arguments.cache is None else arguments.cache
        subject = Subject(
            model,
            samples,
            arguments.batch_size,
            arguments.seed,
            bar.update,
            clip,
            training,
            cache=Path(cache) if cache else None,
            energy=energy,
        )
        scores = evaluate(evaluator, subject)
    return {
        "n": len(samples),
        "protocol": evaluator.protocol,
        "scores": scores,
        "notes": getattr(evaluator, "notes", []),
        "cost": cost,
    }


def section_of(title: str, result: dict[str, Any], evaluator: "Evaluator", seed: int) -> "Section":
    """The section of the page for one task: scores and examples."""
    from multimodal.eval.evaluator import select_examples
    from multimodal.eval.page import Figure, Numbers, Section

    numbers = [
        (
            name,
            f"{score['value']:,.4g}",
            f"{score['low']:.4g} to {score['high']:.4g}" if "low" in score else "",
        )
        for name, score in result["scores"].items()
    ]
    section = Section(
        title,
        "; ".join([f"{result['n']:,} samples", evaluator.protocol, *result["notes"]]),
        seconds=result["cost"]["seconds"],
        numbers=[Numbers(numbers)],
    )
    for name, examples in select_examples(evaluator.examples, SHOWN, seed).items():
        if examples:
            figures = [Figure(example.image, example.text) for example in examples]
            section.rows.append((name, figures))
    return section


def protocol_of(
    arguments: argparse.Namespace, model: "Model", clip: "ClipScore | None"
) -> dict[str, Any]:
    """What all results of a run have in common."""
    from multimodal.distributed import world_size

    tokenizer = model.image_tokenizer
    return {
        "model": arguments.model,
        **({"adapter": arguments.adapter} if arguments.adapter else {}),
        "fingerprint": model.fingerprint,
        "split": arguments.split,
        "image_size": tokenizer.image_size,
        "fit": tokenizer.fit,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "threads": arguments.threads,
        "grams_per_kwh": arguments.grams_per_kwh,
        "ranks": world_size(),
        "clip": clip.name if clip else None,
        "commit": git_commit(),
        "versions": {name: version(name) for name in ("multimodal", "torch", "pillow")},
    }


@contextmanager
def measure_cost(embeddings: "nn.Module", meter: EnergyMeter) -> Iterator[dict[str, Any]]:
    """Measure the cost of a task.

    Args:
        embeddings: the module that embeds every token.
        meter: of energy, just started.

    Yields:
        A dictionary that is filled at the end:

        - ``tokens``: read by the transformer on this rank, with padding and generated tokens.
        - ``seconds``, and ``cpu_seconds`` of all cores.
        - ``peak_megabytes``: largest memory of the process so far.
        - ``watt_hours`` and ``co2_grams``, and ``energy``: how they were measured or estimated.
    """
    cost: dict[str, Any] = {"tokens": 0}

    def count(_: "nn.Module", ids: "tuple[Tensor, ...]", __: "Tensor") -> None:
        cost["tokens"] += ids[0].numel()

    hook = embeddings.register_forward_hook(count)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    try:
        yield cost
    finally:
        hook.remove()
    after = resource.getrusage(resource.RUSAGE_SELF)
    energy = meter.read()
    cost |= {"watt_hours": energy.watt_hours, "co2_grams": energy.co2_grams, "energy": energy.how}
    cost["seconds"] = time.perf_counter() - start
    cost["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost["peak_megabytes"] = after.ru_maxrss / (1 << 10 if sys.platform == "linux" else 1 << 20)


def git_commit() -> str:
    """The commit of the checkout, with a + if files differ. "unknown" without a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.strip()

    try:
        head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def format_table(report: dict[str, Any]) -> str:
    """One line for each score, with its interval if it has one."""
    lines = []
    for result in report["results"]:
        cost = result["cost"]
        lines.append(
            f"{result['task']}: {result['data']}, {result['n']:,} samples, "
            f"{cost['seconds']:.0f} s, {cost['watt_hours']:.3g} Wh"
        )
        width = max(map(len, result["scores"]), default=0)
        for name, score in result["scores"].items():
            line = f"  {name:<{width}}  {score['value']:10.4f}"
            if "low" in score:
                line += f"   {score['low']:.4f} to {score['high']:.4f}"
            lines.append(line)
        lines += [f"  {note}" for note in result["notes"]]
    about = report["protocol"]
    total = [
        sum(r["cost"][name] for r in report["results"]) for name in ("watt_hours", "co2_grams")
    ]
    how = report["results"][0]["cost"]["energy"]
    lines.append(f"energy: {total[0]:.3g} Wh, {total[1]:.3g} g CO2; {how}")
    lines.append(
        f"model {about['model']} ({about['fingerprint']}), {about['image_size']} x "
        f"{about['image_size']} ({about['fit']}), split {about['split']}, seed {about['seed']}, "
        f"commit {about['commit']}"
    )
    return "\n".join(lines)
