"""``multimodal eval``: one command for what a model can do, with the protocol of every number."""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.commands.options import check_output, load_model, parser
from multimodal.data.shards import Shards
from multimodal.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from multimodal.data.samples import Sample

TASKS = ("captioning", "answers", "choices", "presence", "retrieval", "classification",
         "likelihood", "drawing", "reconstruction", "few_shot", "robustness")  # fmt: skip
EPILOG = """TASK is one of captioning, answers, choices, presence, retrieval, classification,
likelihood, drawing, reconstruction, few_shot, robustness, or all, or FILE.py:CLASS, an evaluator
of your own (docs/evaluation.md). Of a folder without what a task needs (captions, questions,
classes) it is left out. Intervals are of 95 %, by the bootstrap over samples. Under torchrun,
ranks share the samples. Nothing is downloaded.

examples:
  multimodal eval all --data data/scenes --limit 200 --output results.json --page results.html
  multimodal eval captioning retrieval --model runs/photos-joint/model --data data/flickr8k
  multimodal eval mine.py:Colours --data data/scenes
"""
SHOWN = 8  # best, worst and random examples on the page


def main(argv: list[str]) -> int:
    made = parser("eval", "Measure what a model can do.", EPILOG)
    made.add_argument("tasks", nargs="+", metavar="TASK")
    made.add_argument("--data", type=Path, nargs="+", required=True, help="shard folders")
    made.add_argument("--split", default="val", help="of the folders (default val)")
    made.add_argument("--limit", type=int, default=1000, help="samples of each, the first ones")
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--clip", metavar="MODEL=FILE", help="an open_clip model and its weights "
                      "(safetensors), to judge drawings by CLIPScore")  # fmt: skip
    made.add_argument("--output", type=Path, help="a JSON file for the results")
    made.add_argument("--page", type=Path, help="an HTML file: best, worst and random samples")
    arguments = made.parse_args(argv)
    for task in arguments.tasks:
        if task not in (*TASKS, "all") and ":" not in task:
            made.error(f"TASK {task}: expected {', '.join(TASKS)}, all, or FILE.py:CLASS")
    if arguments.limit < 1 or arguments.batch_size < 1:
        raise ValueError("--limit and --batch-size: expected at least 1")
    for path, suffix in ((arguments.output, ".json"), (arguments.page, ".html")):
        if path:
            check_output(path, (suffix,))
    samples = {
        folder: list(islice(Shards(folder, arguments.split), arguments.limit))
        for folder in arguments.data
    }
    from multimodal.distributed import process_group  # imports torch

    named = [TASKS if task == "all" else (task,) for task in arguments.tasks]
    tasks = tuple(dict.fromkeys(chain.from_iterable(named)))
    with process_group() as rank:
        report = run(arguments, tasks, samples, first=rank == 0)
    if rank:
        return 0
    print(table(report))
    if arguments.output:
        with atomic_file(arguments.output) as file:
            file.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


def run(
    arguments: argparse.Namespace,
    tasks: tuple[str, ...],
    samples: "dict[Path, list[Sample]]",
    first: bool,
) -> dict[str, Any]:
    """The report; the first rank writes the page on the way."""
    from tqdm import tqdm

    from multimodal.distributed import world_size
    from multimodal.eval.evaluator import Subject, chosen, evaluate
    from multimodal.eval.metrics.clip_score import ClipScore
    from multimodal.eval.page import Figure, Numbers, Section, page
    from multimodal.eval.tasks.registry import find_evaluator

    makers = {task: find_evaluator(task) for task in tasks}
    clip = ClipScore(arguments.clip) if arguments.clip else None
    model = load_model(arguments)
    config = model.image_tokenizer.config
    results: list[dict[str, Any]] = []
    sections: list[Section] = []
    for folder, all_of_it in samples.items():
        for task, make in makers.items():
            evaluator = make()
            usable = [sample for sample in all_of_it if evaluator.fits(sample)]
            if not usable:
                continue
            with (
                tqdm(
                    desc=f"{folder} {task}", file=sys.stderr, disable=None if first else True
                ) as bar,  # fmt: skip
                cost(model.transformer.embed_tokens) as paid,
            ):
                subject = Subject(
                    model, usable, arguments.batch_size, arguments.seed, bar.update, clip
                )
                scores = evaluate(evaluator, subject)
            results.append({
                "task": task, "data": str(folder), "n": len(usable),
                "protocol": evaluator.protocol, "scores": scores, "cost": paid,
            })  # fmt: skip
            numbers = [
                (name, f"{score['value']:,.4g}",
                 f"{score['low']:.4g} to {score['high']:.4g}" if "low" in score else "")
                for name, score in scores.items()
            ]  # fmt: skip
            section = Section(f"{task}: {folder}", f"{len(usable):,} samples; {evaluator.protocol}",
                              seconds=paid["seconds"], numbers=[Numbers(numbers)])  # fmt: skip
            for name, examples in chosen(evaluator.examples, SHOWN, arguments.seed).items():
                if examples:
                    figures = [Figure(one.image, one.text) for one in examples]
                    section.rows.append((name, figures))
            sections.append(section)
    if not results:
        raise ValueError(f"no sample of {', '.join(map(str, samples))} fits {', '.join(tasks)}")
    report = {
        "protocol": {
            "model": arguments.model, "fingerprint": model.fingerprint, "split": arguments.split,
            "image_size": config.image_size, "fit": config.fit, "seed": arguments.seed,
            "dtype": arguments.dtype, "device": arguments.device, "threads": arguments.threads,
            "ranks": world_size(), "clip": clip.name if clip else None,
            "commit": commit(),
            "versions": {name: version(name) for name in ("multimodal", "torch", "pillow")},
        },
        "results": results,
    }  # fmt: skip
    if arguments.page and first:
        with atomic_file(arguments.page) as file:
            file.write_text(page(f"{arguments.model} ({model.fingerprint})", f"commit {commit()}",
                                 sections), "utf-8")  # fmt: skip
    return report


@contextmanager
def cost(embeddings: "nn.Module") -> Iterator[dict[str, float]]:
    """What a task costs: tokens that the transformer read on this rank (padding and what it wrote
    itself among them), seconds, those of all cores, and the largest the process was until then, put
    into the dictionary when it is done. embeddings: where every token passes."""
    paid: dict[str, float] = {"tokens": 0}

    def count(_: "nn.Module", ids: "tuple[Tensor, ...]", __: "Tensor") -> None:
        paid["tokens"] += ids[0].numel()

    counting = embeddings.register_forward_hook(count)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    try:
        yield paid
    finally:
        counting.remove()
    after = resource.getrusage(resource.RUSAGE_SELF)
    paid["seconds"] = time.perf_counter() - start
    paid["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    paid["peak_megabytes"] = after.ru_maxrss / (1 << 10 if sys.platform == "linux" else 1 << 20)


def commit() -> str:
    """Of the checkout that runs, with a + where files differ from it; unknown where it is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def table(report: dict[str, Any]) -> str:
    """Every score in a line, with its interval where it has one."""
    lines = []
    for result in report["results"]:
        seconds = result["cost"]["seconds"]
        lines.append(
            f"{result['task']}: {result['data']}, {result['n']:,} samples, {seconds:.0f} s"
        )
        width = max(map(len, result["scores"]))
        for name, score in result["scores"].items():
            line = f"  {name:<{width}}  {score['value']:10.4f}"
            if "low" in score:
                line += f"   {score['low']:.4f} to {score['high']:.4f}"
            lines.append(line)
    about = report["protocol"]
    lines.append(
        f"model {about['model']} ({about['fingerprint']}), {about['image_size']} x "
        f"{about['image_size']} ({about['fit']}), split {about['split']}, seed {about['seed']}, "
        f"commit {about['commit']}"
    )
    return "\n".join(lines)
