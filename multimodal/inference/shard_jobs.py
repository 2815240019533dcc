"""Captions and embeddings of whole shard folders, one or two files for each shard.

``NAME.jsonl`` has a line for each sample of ``NAME.tar`` in its order: ``{"key", "caption"}``. For
embeddings it is ``{"key", "row"}``, and the rows are in ``NAME.npy`` (float32, unit norm). An image
that cannot be read has ``"error"`` in the place of its result. ``job.json`` holds the arguments.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from multimodal.data.jobs import job_folder
from multimodal.data.parallel import Engine, map_units
from multimodal.data.shards import Shards, read_manifest
from multimodal.files import atomic_file, local_path
from multimodal.inference.codec import check_pixels, encode_to_read, read_images
from multimodal.inference.embedding import embed_codes
from multimodal.inference.text import best_captions
from multimodal.model.checkpoint import ModelParts
from multimodal.options import CaptionOptions

SETTINGS = "job.json"
Kind = Literal["caption", "embed"]


@dataclass(frozen=True)
class Job:
    """What is done with every shard.

    Args:
        kind: ``caption`` or ``embed``.
        model: a model folder, or the name of a bundled one.
        dtype: of the network: float32 or bfloat16.
        options: of captions.
        threads: CPU threads of each process. Rows of embeddings depend on it in their last bits.
            0: torch's choice.
        adapter: of the model, a folder or its name on the Hub.
    """

    kind: Kind
    model: str
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 32
    options: CaptionOptions = field(default_factory=CaptionOptions)
    threads: int = 0
    adapter: str | None = None


@dataclass(frozen=True)
class ShardTask:
    """One shard. first: the number of its first sample in the folder."""

    job: Job
    source: Path
    out: Path
    name: str
    first: int

    @property
    def lines(self) -> Path:
        return self.out / f"{Path(self.name).stem}.jsonl"

    @property
    def rows(self) -> Path:
        return self.out / f"{Path(self.name).stem}.npy"

    def done(self) -> bool:
        return self.lines.is_file()  # this file is written last


def run_job(
    job: Job,
    source: str | Path,
    out: str | Path,
    split: str | None = None,
    engine: Engine = "processes",
    workers: int = 1,
    on_sample: Callable[[int], object] = lambda count: None,
) -> tuple[int, int] | None:
    """Do a job over a shard folder.

    Args:
        source: the shard folder.
        out: the folder of the results: new, empty, or left by an earlier call with the same
            arguments. Shards with a result are not done again.
        split: do only this split.
        engine, workers: see ``map_units``.
        on_sample: is called with the number of samples of each finished shard.

    Returns:
        How many samples have a result, and how many could not be read. None on all ranks of
        torchrun but the first.

    Raises:
        ValueError: for a split that does not exist, codes of another tokenizer, or a folder with
            other results.
    """
    source, out = Path(source), local_path(out)
    entries = read_manifest(source)["shards"]
    splits = {str(entry["split"]) for entry in entries}
    if split is not None and split not in splits:
        raise ValueError(f"{source}: no split {split!r}; it has {', '.join(sorted(splits))}")
    model = _model(job.model, job.device, job.dtype, job.adapter)
    check_codes_fit(model, Shards(source, split))
    arguments = {
        "kind": job.kind,
        "model": model.fingerprint,
        "dtype": job.dtype,
        "threads": job.threads,
        "split": split,
        "shards": [entry["sha256"] for entry in entries if split in (None, entry["split"])],
        **(asdict(job.options) if job.kind == "caption" else {}),
    }
    shards, first = [], 0
    for entry in entries:
        if split in (None, entry["split"]):
            shards.append(ShardTask(job, source, out, str(entry["name"]), first))
            first += int(entry["samples"])
    done = failed = 0
    with job_folder(out, out / SETTINGS, arguments) as ends:
        for good, bad in map_units(run_shard, shards, engine, workers, done=ShardTask.done):
            on_sample(good + bad)
            done, failed = done + good, failed + bad
        if ends:
            for part in out.glob(".*.part"):  # of processes that were killed
                part.unlink(missing_ok=True)
    return (done, failed) if ends else None


def check_codes_fit(model: ModelParts, shards: Shards) -> None:
    """Raises ``ValueError`` for shards of codes that the model does not read."""
    if shards.encoding is None:
        return
    stored, expected = shards.encoding.get("fingerprint"), model.image_tokenizer.codes_fingerprint
    if stored != expected:
        raise ValueError(
            f"{shards.folder}: its codes are of another image tokenizer ({stored}; the model "
            f"reads codes {expected})"
        )


def run_shard(shard: ShardTask) -> tuple[int, int]:
    """Write the files of one shard, unless they are there.

    Returns:
        How many samples have a result, and how many have an error.
    """
    if not shard.done():
        job = shard.job
        if job.threads:
            torch.set_num_threads(job.threads)
        lines, rows = _results(_model(job.model, job.device, job.dtype, job.adapter), shard)
        if rows is not None:
            with atomic_file(shard.rows, shared=True) as part, open(part, "wb") as file:
                np.save(file, rows.numpy(), allow_pickle=False)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with atomic_file(shard.lines, shared=True) as part:
            part.write_bytes(text.encode())
    with open(shard.lines, encoding="utf-8", newline="\n") as text_file:  # no other line breaks
        written = [json.loads(line) for line in text_file]
    failed = sum("error" in line for line in written)
    return len(written) - failed, failed


@lru_cache(1)
def _model(folder: str, device: str, dtype: str, adapter: str | None) -> ModelParts:
    return ModelParts.load(folder, device, getattr(torch, dtype), adapter=adapter)


def _results(model: ModelParts, shard: ShardTask) -> tuple[list[dict[str, Any]], Tensor | None]:
    """A line for each sample of the shard, and the rows of embeddings."""
    job, samples = shard.job, Shards(shard.source, only=shard.name)
    lines: list[dict[str, Any]] = []
    codes: list[Tensor] = []
    readable: list[int] = []  # the numbers of the samples that have codes
    for start in range(0, len(samples), job.batch_size):
        part = range(start, min(start + job.batch_size, len(samples)))
        if samples.encoding is None:
            check_pixels(model, len(part))
        batch: list[Tensor] = []  # the codes, or the pixels, of each sample
        for number in part:
            sample = samples[number]
            lines.append({"key": sample.key})
            try:
                if samples.encoding is not None:
                    batch.append(torch.from_numpy(sample.codes[:1]).flatten(1))
                else:
                    batch.append(read_images(model, [sample.image], [sample.key]))
                readable.append(number)
            except ValueError as error:
                lines[-1]["error"] = str(error)
        if batch:
            together = torch.cat(batch)
            codes.append(encode_to_read(model, together) if samples.encoding is None else together)
    all_codes = torch.cat(codes) if codes else torch.zeros(0, 0, dtype=torch.int64)
    if job.kind == "embed":
        for row, number in enumerate(readable):
            lines[number]["row"] = row
        parts = torch.split(all_codes, job.batch_size) if codes else ()
        rows = [embed_codes(model, part) for part in parts]
        width = model.config.objectives.alignment_dim
        return lines, torch.cat(rows) if rows else torch.zeros(0, width)
    numbers = [shard.first + number for number in readable]
    captions = best_captions(model, all_codes, job.options, numbers, batch_size=job.batch_size)
    for number, caption in zip(readable, captions, strict=True):
        lines[number]["caption"] = caption
    return lines, None
