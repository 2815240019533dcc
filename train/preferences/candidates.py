"""Preferences that a model makes itself: it writes or draws several candidates, a judge scores
them, the best one is chosen and the worst one rejected.

The unit of work is a chunk of samples, which becomes a shard. A run that was stopped goes on with
the chunks that are missing. Everything random about a sample depends on its key and the seed.

Shapes: S samples, k candidates of each, n codes of an image.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from multimodal.data.encode import Encoding, codes_to_bytes
from multimodal.data.jobs import job_folder
from multimodal.data.samples import CODES, Sample
from multimodal.data.shards import (
    MANIFEST,
    Shards,
    file_sha256,
    index_shard,
    read_manifest,
    splits_of,
    write_manifest,
    write_tar,
)
from multimodal.eval.metrics.scene_captions import has_scene
from multimodal.files import atomic_file, lines_of, local_path, read_text
from multimodal.inference.codec import encode_images, read_images, text_fits
from multimodal.inference.drawing import draw_codes
from multimodal.inference.shard_jobs import check_codes_fit
from multimodal.inference.text import text_ends
from multimodal.model.checkpoint import ModelParts
from multimodal.model.lessons import descriptions_of
from multimodal.options import MAX_CANDIDATES, DrawOptions, TextOptions
from multimodal.seeds import sample_seed
from multimodal.train.examples import select_encoding
from multimodal.train.rewards.judges import Judge, completed, find_judge, text_to_draw
from multimodal.train.rewards.rewards import Reward, WrittenText, find_reward
from multimodal.train.rewards.tasks import write_texts

SETTINGS = "job.json"
CANDIDATES = "candidates.jsonl"
CHUNK = 200  # samples: some minutes of work, which a run that was killed has to repeat
KEPT_FIELDS = ("source", "license", "scene")  # of the record, beside a drawing
BY_REFERENCES = ("cider", "objects")  # judges that compare with the captions of an image
Kind = Literal["captions", "drawings"]


@dataclass(frozen=True)
class PreferSettings:
    """How preferences are made.

    Args:
        kind: ``captions`` of the images, or ``drawings`` of their captions.
        judge: see ``find_reward`` for captions, ``find_judge`` for drawings.
        candidates: k.
        margin: how much better the best one has to be than the worst one, at least.
        batch_size: samples at once.
        options: of texts or of drawings.
    """

    kind: Kind
    judge: str
    options: TextOptions | DrawOptions
    candidates: int = 4
    margin: float = 0.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.candidates <= MAX_CANDIDATES:
            raise ValueError(f"candidates={self.candidates}: expected 2 to {MAX_CANDIDATES:,}")
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin={self.margin}: expected 0 or more")
        if not self.options.temperature:
            raise ValueError("temperature=0: all candidates would be equal")


@dataclass
class Candidates:
    """What the model made of one sample, and how good it is.

    Attributes:
        members: of the sample of a shard that it becomes.
        reason: why it becomes none.
    """

    key: str
    prompt: str = ""
    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    chosen: int | None = None
    rejected: int | None = None
    reason: str = ""
    members: dict[str, bytes] = field(default_factory=dict, repr=False)

    def choose(self, usable: Sequence[int], margin: float) -> bool:
        """Choose the best and the worst of the usable candidates, if they differ enough."""
        if len(usable) < 2:
            self.reason = "fewer than two different candidates"
            return False
        best = max(usable, key=lambda number: self.scores[number])
        worst = min(usable, key=lambda number: self.scores[number])
        difference = self.scores[best] - self.scores[worst]
        if difference <= 0 or difference < margin:
            self.reason = "candidates that are as good as one another"
            return False
        self.chosen, self.rejected = best, worst
        return True

    def line(self) -> dict[str, Any]:
        """Of candidates.jsonl."""
        shown = ("key", "prompt", "texts", "scores", "chosen", "rejected", "reason")
        values = {name: getattr(self, name) for name in shown}
        return {name: value for name, value in values.items() if value not in ("", [], None)}


def make_preferences(
    model: ModelParts,
    source: str | Path,
    out: str | Path,
    settings: PreferSettings,
    split: str | None = None,
    limit: int = 0,
    on_sample: Callable[[int], object] = lambda count: None,
) -> list[dict[str, Any]]:
    """Write shards of preferences: ``OUT/train-0000.tar`` ..., and ``OUT/candidates.jsonl``.

    Args:
        model: makes the candidates.
        source: a shard folder of images or codes with the model's image tokenizer.
        out: new, empty, or left by an earlier call with the same arguments.
        split: by default all splits of the source.
        limit: the first so many samples of each split. 0: all.
        on_sample: is called with a number of finished samples.

    Returns:
        The lines of candidates.jsonl.

    Raises:
        ValueError: if the arguments cannot be used, or no sample has candidates that differ.
    """
    source, out = Path(source), local_path(out)
    splits = splits_of(source) if split is None else [split]
    shards = {name: Shards(source, name) for name in splits}
    counts = {name: min(len(each), limit or len(each)) for name, each in shards.items()}
    for each in shards.values():
        check_codes_fit(model, each)
    if (out / MANIFEST).is_file():
        raise ValueError(f"{out}: not empty (it is complete); give a new folder")
    manifest = read_manifest(source)
    arguments: dict[str, Any] = {
        "model": model.fingerprint,  # in bfloat16, too, that of the folder
        "dtype": str(model.network.alignment.log_scale.dtype).removeprefix("torch."),
        "shards": [entry["sha256"] for entry in manifest["shards"]],
        "counts": counts,
        **asdict(settings),
    }
    maker = CandidateMaker(model, settings, shards.get("train", shards[splits[0]]))
    if (judge := Path(settings.judge.rpartition(":")[0])).is_file():  # FILE.py:FUNCTION
        arguments["judge_sha256"] = file_sha256(judge)
    with job_folder(out, out / SETTINGS, arguments, result=out / MANIFEST):
        lines: list[dict[str, Any]] = []
        for name, count in counts.items():
            for number, start in enumerate(range(0, count, CHUNK)):
                chunk = range(start, min(start + CHUNK, count))
                file = out / f"{name}-{number:04d}.jsonl"
                if not file.is_file():
                    _make_chunk(maker, shards[name], chunk, file, on_sample)
                else:
                    on_sample(len(chunk))
                lines += [json.loads(line) for line in lines_of(read_text(file))]
        tars = sorted(out.glob("*.tar"))
        if not tars:
            raise ValueError(f"{source}: no sample has a preference: {reasons_of(lines)}")
        encoding = shards[splits[0]].encoding
        if settings.kind == "drawings":
            encoding = asdict(Encoding.for_tokenizer(model.image_tokenizer))
        about: dict[str, Any] = {"image_tokenizer": encoding} if encoding is not None else {}
        about |= {name: manifest[name] for name in ("source", "license") if name in manifest}
        with atomic_file(out / CANDIDATES) as part:
            part.write_text("".join(_json_line(line) for line in lines), "utf-8")
        entries = [index_shard(tar) for tar in tars]
        made = {**arguments, "shards": None, "left_out": reasons_of(lines)}
        write_manifest(out, entries, made_by="multimodal prefer", preferences=made, **about)
        for file in [*out.glob("*-*.jsonl"), out / SETTINGS, *out.glob(".*.part")]:
            file.unlink(missing_ok=True)
    return lines


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def reasons_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many samples have no preference, by the reason."""
    return dict(Counter(line["reason"] for line in lines if "reason" in line).most_common())


def mean_scores(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the chosen and the rejected candidates, and of all."""
    kept = [line for line in lines if "chosen" in line]
    scores = {
        name: [line["scores"][line[name]] for line in kept] for name in ("chosen", "rejected")
    }
    scores["all"] = [score for line in lines for score in line.get("scores", ())]
    return {name: sum(values) / max(1, len(values)) for name, values in scores.items()}


def _make_chunk(
    maker: "CandidateMaker",
    shards: Shards,
    chunk: range,
    file: Path,
    on_sample: Callable[[int], object],
) -> None:
    """Write the shard of a chunk, if it has any sample, and then its lines."""
    made: list[Candidates] = []
    size = maker.settings.batch_size
    for start in range(chunk.start, chunk.stop, size):
        numbers = range(start, min(start + size, chunk.stop))
        made += maker.make([shards[number] for number in numbers], shards.encoding is not None)
        on_sample(len(numbers))
    kept = [each for each in made if each.members]
    if kept:
        with atomic_file(file.with_suffix(".tar")) as part:
            write_tar(part, ((each.key, each.members) for each in kept))
    with atomic_file(file) as part:
        part.write_text("".join(_json_line(each.line()) for each in made), "utf-8")


class CandidateMaker:
    """Makes and judges the candidates of samples.

    Args:
        shards: CIDEr counts the words in their captions.
    """

    def __init__(self, model: ModelParts, settings: PreferSettings, shards: Shards) -> None:
        self.model, self.settings = model, settings
        self.reward: Reward | None = None
        self.judge: Judge | None = None
        if settings.kind == "captions":
            self.reward = find_reward(settings.judge, model, [shards])
        else:
            self.judge = find_judge(settings.judge, model)

    def make(self, samples: Sequence[Sample], encoded: bool) -> list[Candidates]:
        """The candidates of each sample; encoded: the samples have codes instead of images."""
        made = [Candidates(sample.key) for sample in samples]
        usable = [
            (each, sample, record)
            for each, sample in zip(made, samples, strict=True)
            if (record := self._record(each, sample)) is not None
        ]
        if self.settings.kind == "drawings":
            self._draw(usable)
        else:
            self._write(usable, encoded)
        return made

    def _record(self, made: Candidates, sample: Sample) -> dict[str, Any] | None:
        """The record of a sample, if there is something to make."""
        try:
            record = sample.record
        except ValueError:
            made.reason = "an unreadable record"
            return None
        if self.settings.judge == "scenes" and not has_scene(record):
            made.reason = "no scene to judge by"
        elif self.settings.kind == "drawings":
            of_scene = self.settings.judge == "scenes"
            made.prompt = text_to_draw(record, of_scene, self._seed(made.key)) or ""
            if not made.prompt:
                made.reason = "no caption to draw after"
            elif not text_fits(self.model, made.prompt):
                made.reason = "a caption longer than what the model reads"
        elif self.settings.judge in BY_REFERENCES and not descriptions_of(record):
            made.reason = "no captions to compare with"
        return None if made.reason else record

    def _seed(self, key: str) -> int:
        return sample_seed(self.settings.options.seed, 0, key)

    def _write(
        self, usable: Sequence[tuple[Candidates, Sample, dict[str, Any]]], encoded: bool
    ) -> None:
        """Captions of images."""
        model, settings = self.model, self.settings
        encoding = asdict(Encoding.for_tokenizer(model.image_tokenizer))
        assert self.reward is not None and isinstance(settings.options, TextOptions)
        read: list[tuple[Candidates, Sample, dict[str, Any], Tensor]] = []
        for made, sample, record in usable:
            try:
                if encoded:
                    codes = torch.from_numpy(select_encoding(sample.codes[:1], encoding, 0))
                else:
                    pixels = read_images(model, [sample.image], [sample.key])
                    codes = encode_images(model, pixels)[0].cpu()
                read.append((made, sample, record, codes))
            except ValueError:
                made.reason = f"{'codes' if encoded else 'an image'} that cannot be read"
        if not read:
            return
        seen = [model.read(codes[None])[0].numpy() for *_, codes in read]
        seeds = [self._seed(made.key) for made, *_ in read]
        written = write_texts(model, seen, seeds, settings.candidates, settings.options)
        ends, decode = text_ends(model), model.text_tokenizer.decode
        captions = [
            WrittenText(
                decode([token for token in ids if token not in ends]).strip(),
                ids[-1] in ends,
                record,
                codes.numpy(),
            )
            for (_, _, record, codes), texts in zip(read, written, strict=True)
            for ids in texts
        ]
        scores = iter(self.reward(captions))
        for number, (made, sample, record, _) in enumerate(read):
            own = captions[number * settings.candidates :][: settings.candidates]
            made.texts, made.scores = [c.text for c in own], [float(next(scores)) for _ in own]
            # A caption without an end would be learned with one.
            ended = {c.text: n for n, c in reversed(list(enumerate(own))) if c.ended and c.text}
            if made.choose(sorted(ended.values()), settings.margin):
                assert made.chosen is not None and made.rejected is not None
                entry = {"chosen": made.texts[made.chosen], "rejected": made.texts[made.rejected]}
                rest = {k: v for k, v in sample.members.items() if k not in ("json", "txt", "cls")}
                made.members = {**rest, "json": _as_json({**record, "preferences": [entry]})}

    def _draw(self, usable: Sequence[tuple[Candidates, Sample, dict[str, Any]]]) -> None:
        """Drawings of captions."""
        model, settings = self.model, self.settings
        assert self.judge is not None and isinstance(settings.options, DrawOptions)
        if not usable:
            return
        k = settings.candidates
        texts = [made.prompt for made, *_ in usable for _ in range(k)]
        numbers = [self._seed(made.key) * k + number for made, *_ in usable for number in range(k)]
        codes = completed(model, draw_codes(model, texts, settings.options, numbers=numbers))
        records = [record for *_, record in usable for _ in range(k)]
        scores = self.judge(texts, codes, records)
        size = model.config.layout.codebook_size
        for (made, _, record), drawn, own in zip(
            usable, torch.split(codes, k), _chunks(scores, k), strict=True
        ):
            made.scores = own
            different = {image.numpy().tobytes(): n for n, image in enumerate(drawn)}
            if made.choose(sorted(different.values()), settings.margin):
                both = drawn[[made.chosen, made.rejected]].numpy()
                images = {
                    f"{n}.{CODES}": codes_to_bytes(image[None], size)
                    for n, image in enumerate(both)
                }
                entry = {
                    "prompt": made.prompt,
                    "chosen": {"image": "0"},
                    "rejected": {"image": "1"},
                }
                fields = {name: record[name] for name in KEPT_FIELDS if name in record}
                content = [{"text": made.prompt}, {"image": "0"}, {"image": "1"}]
                fields |= {"content": content, "preferences": [entry]}
                made.members = {**images, "json": _as_json(fields)}


def _chunks(values: Sequence[float], size: int) -> Iterator[list[float]]:
    for start in range(0, len(values), size):
        yield [float(value) for value in values[start : start + size]]


def _as_json(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()
