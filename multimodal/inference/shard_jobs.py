"""Captions and embeddings of whole shard folders, a file or two for each shard.

``NAME.jsonl`` has a line for each sample of ``NAME.tar``, in its order: ``{"key", "caption"}`` or,
of embeddings, ``{"key", "row"}`` with the rows in ``NAME.npy`` (float32, unit norm). An image that
cannot be read has ``"error"`` in the place of its result. ``job.json`` says how they came about.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from multimodal.data.jobs import job_folder
from multimodal.data.parallel import Engine, map_units
from multimodal.data.shards import Shards, read_manifest
from multimodal.files import atomic_file
from multimodal.inference.embedding import embed_codes
from multimodal.inference.sampling import Sampling
from multimodal.inference.text import caption_codes, encode_images, read_images
from multimodal.model.checkpoint import load

if TYPE_CHECKING:
    from multimodal.model.network import Multimodal

SETTINGS = "job.json"
Kind = Literal["caption", "embed"]


@dataclass(frozen=True)
class Job:
    """What is done with every shard. model: a folder or ``starter``; threads: of each process."""

    kind: Kind
    model: str
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 32
    max_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    threads: int = 0


@dataclass(frozen=True)
class ShardOfJob:
    """One shard; first: the number of its first sample in the folder."""

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
        return self.lines.is_file()  # it is written last


def run_job(
    job: Job,
    source: str | Path,
    out: str | Path,
    split: str | None = None,
    engine: Engine = "processes",
    workers: int = 1,
    on_sample: Callable[[int], object] = lambda count: None,
) -> tuple[int, int] | None:
    """Returns how many samples have a result and how many could not be read; None on all ranks of
    torchrun but the first.

    out: a folder that is not there, is empty, or holds what an earlier call with the same arguments
        left: what is there is not done again.
    """
    source, out = Path(source), Path(out)
    entries = read_manifest(source)["shards"]
    splits = {str(entry["split"]) for entry in entries}
    if split is not None and split not in splits:
        raise ValueError(f"{source}: no split {split!r}; it has {', '.join(sorted(splits))}")
    model = _model(job.model, job.device, job.dtype)
    check_codes_fit(model, Shards(source, split))
    begun_with = {
        "kind": job.kind, "model": model.fingerprint, "dtype": job.dtype, "split": split,
        "shards": [entry["sha256"] for entry in entries if split in (None, entry["split"])],
        **({"max_tokens": job.max_tokens, "stop": list(job.stop), **asdict(job.sampling)}
           if job.kind == "caption" else {}),
    }  # fmt: skip
    shards, first = [], 0
    for entry in entries:
        if split in (None, entry["split"]):
            shards.append(ShardOfJob(job, source, out, str(entry["name"]), first))
            first += int(entry["samples"])
    done = failed = 0
    with job_folder(out, out / SETTINGS, begun_with) as ends:
        for good, bad in map_units(run_shard, shards, engine, workers, done=ShardOfJob.done):
            on_sample(good + bad)
            done, failed = done + good, failed + bad
        if ends:
            for part in out.glob(".*.part"):  # of processes that were killed
                part.unlink(missing_ok=True)
    return (done, failed) if ends else None


def check_codes_fit(model: "Multimodal", shards: Shards) -> None:
    """Errors: ``ValueError`` for shards of codes that the model does not read."""
    if shards.encoding is None:
        return
    made_by, read = shards.encoding.get("fingerprint"), model.image_tokenizer.codes_fingerprint
    if made_by != read:
        raise ValueError(
            f"{shards.folder}: its codes are of another image tokenizer ({made_by}; the model "
            f"reads codes {read})"
        )


def run_shard(shard: ShardOfJob) -> tuple[int, int]:
    """Write the files of one shard, unless they are there; returns how many samples have a result,
    and how many none."""
    if not shard.done():
        job = shard.job
        if job.threads:
            torch.set_num_threads(job.threads)
        lines, rows = _results(_model(job.model, job.device, job.dtype), shard)
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
def _model(folder: str, device: str, dtype: str) -> "Multimodal":
    return load(folder, device, getattr(torch, dtype))


def _results(model: "Multimodal", shard: ShardOfJob) -> tuple[list[dict[str, Any]], Tensor | None]:
    """A line for each sample of the shard, and the rows of embeddings."""
    job, samples = shard.job, Shards(shard.source, only=shard.name)
    lines: list[dict[str, Any]] = []
    codes: list[Tensor] = []
    whose: list[int] = []  # the numbers of the samples that have codes
    for number in range(len(samples)):
        sample = samples[number]
        lines.append({"key": sample.key})
        try:
            if samples.encoding is not None:
                codes.append(torch.from_numpy(sample.codes[:1]).flatten(1))
            else:
                pixels = read_images(model, [sample.image], [sample.key])
                codes.append(encode_images(model, pixels))
            whose.append(number)
        except ValueError as error:
            lines[-1]["error"] = str(error)
    together = torch.cat(codes) if codes else torch.zeros(0, 0, dtype=torch.int64)
    if job.kind == "embed":
        for row, number in enumerate(whose):
            lines[number]["row"] = row
        parts = torch.split(together, job.batch_size) if codes else ()
        rows = [embed_codes(model, part) for part in parts]
        width = model.config.objectives.alignment_dim
        return lines, torch.cat(rows) if rows else torch.zeros(0, width)
    numbers = [shard.first + number for number in whose]
    captions = caption_codes(model, together, job.max_tokens, job.sampling, numbers, job.stop,
                             job.batch_size)  # fmt: skip
    for number, caption in zip(whose, captions, strict=True):
        lines[number]["caption"] = caption
    return lines, None
