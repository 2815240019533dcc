"""What fewer bits cost and give: a model in float32 and bfloat16, and quantized to int8 and int4.

int4 is made twice: from the weights alone, and with samples of the split train of --data.

    python benchmarks/fewer_bits.py --data data/flickr8k [--model starter] [--split val]
        [--photos 500] [--rounds 5] [--threads 1]

size: bytes of the weights of the network on disk (model.safetensors, heads.safetensors), without
    the image tokenizer, which is the same for all. Floats are stored in bfloat16 for all rows but
    float32.
memory: bytes of the tensors of the network when it is loaded. Keys and values come on top.
CIDEr: greedy captions of the first --photos samples with a caption, with its 95 % interval.
answers: the share of right answers to all questions about the same number of samples, if any.
agree: the share of captions that are those of bfloat16, word for word.
tokens/s: greedy captions from codes, of one photo after the other and of 32 together. All rows take
    turns, and the median of the rounds counts.

int8 and int4 are loaded as any model is by default: in float32. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from multimodal import load
from multimodal.api import Model
from multimodal.data.shards import Shards
from multimodal.eval.evaluator import Subject, interval
from multimodal.eval.metrics.answering import same_answer
from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.tasks.answers import SHORT_ANSWER, all_questions, has_questions
from multimodal.export.model import export_model
from multimodal.export.quantize import quantize_model
from multimodal.inference.text import caption_codes, complete_prompts, generate_ids
from multimodal.memory import keep_freed_memory
from multimodal.model.lessons import descriptions_of
from multimodal.model.sequences import describe_prompt
from multimodal.options import TextOptions

BATCH, ALONE = 32, 8  # photos at a time, and one after the other
GREEDY = TextOptions()
WITH_SAMPLES = "int4_with_samples"


@dataclass(frozen=True)
class Row:
    """A model folder, and how it is loaded."""

    folder: Path
    model: Model

    def facts(self) -> dict[str, Any]:
        files = ("model.safetensors", "heads.safetensors")
        tensors = {id(p): p for p in self.model.network.parameters()}.values()
        return {
            "size": sum((self.folder / name).stat().st_size for name in files),
            "memory": sum(p.numel() * p.element_size() for p in tensors),
        }


def rows_of(name: str, folder: Path, data: Path) -> dict[str, Row]:
    for dtype in ("float32", "bfloat16"):
        export_model(name, folder / dtype, dtype)
    quantize_model(name, folder / "int8", "int8")
    quantize_model(name, folder / "int4", "int4")
    quantize_model(name, folder / WITH_SAMPLES, "int4", data)
    return {
        kind: Row(
            folder / kind, load(folder / kind, dtype=kind if kind == "bfloat16" else "float32")
        )
        for kind in ("float32", "bfloat16", "int8", "int4", WITH_SAMPLES)
    }


def captions_of(subject: Subject) -> list[str]:
    codes, model = subject.codes, subject.model
    return subject.map_batches(
        range(len(codes)), lambda batch: caption_codes(model, codes[list(batch)], GREEDY)
    )


def answers_of(subject: Subject) -> dict[str, Any]:
    questions, codes = all_questions(subject), subject.codes
    given = subject.map_batches(
        questions,
        lambda batch: complete_prompts(
            subject.model, codes[[q.row for q in batch]], [q.prompt for q in batch], SHORT_ANSWER
        ),
    )
    right = [float(same_answer(q.answer, a)) for q, a in zip(questions, given, strict=True)]
    low, high = interval(right, groups=[question.row for question in questions])
    return {"value": sum(right) / len(right), "low": low, "high": high, "n": len(right)}


def speeds(rows: dict[str, Row], codes: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens a second by row: alone and together."""
    prompts = [describe_prompt(rows["float32"].model.vocabulary, image) for image in codes.tolist()]

    def timed(model: Model, size: int, count: int) -> float:
        start, tokens = time.perf_counter(), 0
        for first in range(0, count, size):
            written = generate_ids(model, prompts[first : first + size], GREEDY, batch_size=size)
            tokens += sum(len(ids) + 1 for ids in written)  # and <eos>
        return tokens / (time.perf_counter() - start)

    forms = {"alone": (1, min(ALONE, len(prompts))), "together": (BATCH, len(prompts))}
    found: dict[str, dict[str, list[float]]] = {name: {f: [] for f in forms} for name in rows}
    for number in range(rounds + 1):  # the first is to warm up
        for name, row in rows.items():
            for form, (size, count) in forms.items():
                speed = timed(row.model, size, count)
                if number:
                    found[name][form].append(speed)
    return {
        name: {form: statistics.median(each) for form, each in by_form.items()}
        for name, by_form in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--split", default="val")
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own number")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shards = Shards(arguments.data, arguments.split)
    described = list(islice((s for s in shards if descriptions_of(s.record)), arguments.photos))
    asked = list(islice((s for s in shards if has_questions(s)), arguments.photos))
    references = {sample.key: descriptions_of(sample.record) for sample in described}
    figures: dict[str, dict[str, Any]] = {}
    captions: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        rows = rows_of(arguments.model, Path(temporary), arguments.data)
        for name, row in rows.items():
            subject = Subject(row.model, described)
            captions[name] = captions_of(subject)
            by_key = dict(zip(references, captions[name], strict=True))
            scores = score_captions(by_key, references)["per_image"]
            each = [scores[key]["CIDEr"] for key in references]
            low, high = interval(each)
            cider = {"value": sum(each) / len(each), "low": low, "high": high, "n": len(each)}
            figures[name] = {**row.facts(), "CIDEr": cider}
            if asked:
                figures[name]["answers"] = answers_of(Subject(row.model, asked))
        codes = rows["float32"].model.read(Subject(rows["float32"].model, described[:BATCH]).codes)
        for name, speed in speeds(rows, codes, arguments.rounds).items():
            same = [a == b for a, b in zip(captions[name], captions["bfloat16"], strict=True)]
            figures[name] |= {"agree": sum(same) / len(same), "tokens_per_second": speed}
            print(f"{name}: {json.dumps(figures[name])}", flush=True)
        fingerprint = rows["float32"].model.fingerprint
    about = {
        "model": fingerprint,
        "data": arguments.data.name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }
    print(json.dumps({"rows": figures, **about}))


if __name__ == "__main__":
    main()
