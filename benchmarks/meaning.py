"""With which encoder and how many codes an image is read, and what quantizing costs.

    python benchmarks/meaning.py --data data/flickr8k \\
        --encoders timm:tf_efficientnet_lite0=FILE timm:tf_efficientnet_lite2=FILE \\
        [--rows pixels 'tf_efficientnet_lite0/final/*'] [--steps 1000] [--out runs/meaning-table]

Each row trains the same captioner, a `mini` from random weights, on the photos of train for the
same number of steps, and measures it on val by the tasks of ``multimodal eval``:

    pixels                    the codes of the level of detail of --pixels
    MODEL/STAGES/1x2048       one code of 2,048 a position, of features of a frozen encoder
    MODEL/STAGES/2x1024-FORM  two codes of 1,024 a position, residual or product
    MODEL/STAGES/continuous   the features themselves, through a linear layer that is trained with
                              the captioner: the ceiling of what codes can give

STAGES is `final`, or the numbers of stages whose channels stand side by side. Photos are squashed
to 224 x 224, neither cropped nor mirrored, so that an encoder reads each of them once. Features are
kept in --out, and so is one JSON file for each row that is done, which is not done again. The
lookup (eval/metrics/yardsticks.py) captions val without training, by the mean over the positions of
what the row reads. Prints a table. The last line is JSON.

Shapes: N photos, h w positions, D channels, n codes of a photo, W width of the captioner.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fits import file_of, fit_in_memory, markdown, measured_once
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from multimodal.api import Model
from multimodal.data.images import Fit, fit_image, open_image, to_tensor
from multimodal.data.parallel import map_ordered
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards, file_sha256
from multimodal.eval.evaluator import Subject, evaluate, interval
from multimodal.eval.metrics.captioning import score_captions
from multimodal.eval.metrics.penn_treebank import ptb_tokenize
from multimodal.eval.metrics.yardsticks import Lookup
from multimodal.eval.tasks.captioning import Captioning
from multimodal.eval.tasks.retrieval import Retrieval
from multimodal.files import atomic_file
from multimodal.hub.names import part_of
from multimodal.memory import keep_freed_memory
from multimodal.model.batches import BatchBuilder
from multimodal.model.lessons import descriptions_of
from multimodal.model.objectives import ObjectivesConfig
from multimodal.model.training_batch import TrainingBatch, TrainingSample
from multimodal.seeds import sample_seed
from multimodal.tokenizers.encoder import Encoder, EncoderName
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.tokenizers.meaning import Meaning, MeaningConfig, fit_codebooks
from multimodal.tokenizers.text import TextTokenizer

IMAGE_SIZE, GRID, COMPONENTS = 224, 7, 256
POSITIONS = 120_000  # of all photos of train, that codebooks are fitted to
STAGES: tuple[tuple[int, ...], ...] = ((), (-2, -1))
CODES = ("continuous", "1x512", "1x2048", "1x4096", "2x1024-residual", "2x1024-product")
CODES += ("4x1024-residual", "4x1024-product")
OBJECTIVES = ObjectivesConfig(weights={"text": 0.1}, reconstruct_share=0.0, next_token_share=0.0)
VOCABULARY_SIZE = 4096
BATCH, CAPTIONS = 32, 5  # photos of a step, captions of each
CAPTIONS_ROOM = 256  # tokens of a packed row beside those of a photo: the same for all rows
LEARNING_RATE, DROPOUT, LABEL_SMOOTHING = 3e-3, 0.1, 0.1


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        encoder: KIND:MODEL[=FILE]. Empty: the codes of pixels.
        stages: of the encoder. (): its final features.
        codes: one of CODES.
    """

    encoder: str = ""
    stages: tuple[int, ...] = ()
    codes: str = "continuous"

    @property
    def name(self) -> str:
        if not self.encoder:
            return "pixels"
        stages = ",".join(map(str, self.stages)) or "final"
        return f"{EncoderName.parse(self.encoder).model}/{stages}/{self.codes}"

    def new_meaning(self, encoder: Encoder | None = None) -> Meaning:
        """A level of meaning with empty codebooks, and with random weights if no encoder is given.
        For the features themselves it only holds their places.
        """
        codes, _, form = self.codes.replace("continuous", "1x1").partition("-")
        model, numbers = str(EncoderName.parse(self.encoder)), map(int, codes.split("x"))
        sizes = (IMAGE_SIZE, "squash", GRID, *numbers, COMPONENTS, form or "residual")
        return Meaning(MeaningConfig(model, self.stages, *sizes), encoder)


@dataclass(frozen=True)
class Photos:
    """The N photos: those of train, then those of val."""

    samples: list[Sample]
    training: int  # how many are of train
    origin: dict[str, Any]  # of which data, and how many

    @classmethod
    def read(cls, folder: Path, limit: int | None) -> "Photos":
        train, val = (list(islice(Shards(folder, split), limit)) for split in ("train", "val"))
        origin = {"data": Shards(folder).fingerprint, "train": len(train), "val": len(val)}
        return cls(train + val, len(train), origin)

    @cached_property
    def captions(self) -> list[list[str]]:
        return [descriptions_of(sample.record) for sample in self.samples]

    @torch.inference_mode()
    def map(self, size: int, fit: Fit, function: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """Apply a function to the pixels of all photos, a batch at a time: [N, ...]."""

        def pixels(sample: Sample) -> Tensor:
            return to_tensor(fit_image(open_image(sample.image, name=sample.key), size, fit))

        opened = map_ordered(pixels, self.samples, torch.get_num_threads())
        shown = iter(tqdm(opened, name, len(self.samples), disable=None))
        batches = iter(lambda: list(islice(shown, BATCH)), [])
        return torch.cat([function(torch.stack(batch)) for batch in batches])


def features_of(row: Row, photos: Photos, file: Path) -> Tensor:
    """The features of all photos, float16[N, h, w, D]: computed once, then read from the file."""
    if not file.is_file():
        meaning = row.new_meaning(Encoder(row.encoder, row.stages))
        features = photos.map(IMAGE_SIZE, "squash", lambda x: meaning.features(x).half(), file.stem)
        with atomic_file(file) as part:
            save_file({"features": features.contiguous()}, part)
    return load_file(file)["features"]


def some_positions(features: Tensor) -> Tensor:
    """At most POSITIONS of them: float16[N, h, w, D] -> float32[P, D]."""
    flat = features.flatten(0, 2)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    return flat[order[:POSITIONS]].float()


def weights_of(row: Row, pixels: Path) -> str:
    """What sees the photos: 16 hex digits of its weights, or the name of those that timm has."""
    if not row.encoder:
        return load_image_tokenizer(pixels).fingerprint
    name = EncoderName.parse(row.encoder)
    return file_sha256(Path(name.file))[:16] if name.file else str(name)


@dataclass(frozen=True)
class Reading:
    """A captioner with random weights, and the photos as it reads them.

    Attributes:
        codes: int64[N, n].
        vectors: float32[N, D], what the lookup compares.
        figures: of the codebooks.
    """

    model: Model
    codes: Tensor
    vectors: Tensor
    figures: dict[str, Any]


def read_pixels(photos: Photos, tokenizer: ImageTokenizer, text: TextTokenizer) -> Reading:
    model = Model.new("mini", text, tokenizer, OBJECTIVES, ["detail"])
    codes = photos.map(tokenizer.image_size, tokenizer.fit, tokenizer.encode, "pixels")
    numbers = tokenizer.layout.unflatten("detail", codes)[..., 0]
    assert tokenizer.detail is not None, "the model reads it"
    vectors = tokenizer.detail.quantizer.lookup(numbers).detach().mean((1, 2))
    return Reading(model, codes, vectors, {})


def read_codes(row: Row, features: Tensor, training: int, text: TextTokenizer) -> Reading:
    start, meaning = time.perf_counter(), row.new_meaning()
    fitted = fit_codebooks(meaning, some_positions(features[:training]))
    codes = torch.cat([meaning.quantize(part) for part in features.split(100)])
    figures = {
        "variance_explained": fitted.explained,
        "variance_lost": fitted.lost[-1],
        "codes_used": [clusters.used for clusters in fitted.clusters],
        "minutes_fitting": (time.perf_counter() - start) / 60,
    }
    # Back from components to features: the components are orthonormal.
    found = torch.cat([meaning.lookup(part).mean((1, 2)) for part in codes.split(100)])
    vectors = found @ meaning.components.T + meaning.center
    tokenizer = ImageTokenizer(meaning)
    model = Model.new("mini", text, tokenizer, OBJECTIVES)
    return Reading(model, tokenizer.layout.flatten("meaning", codes), vectors, figures)


def read_continuous(row: Row, features: Tensor, training: int, text: TextTokenizer) -> Reading:
    model = Model.new("mini", text, ImageTokenizer(row.new_meaning()), OBJECTIVES)
    transformer, flat = model.network.transformer, features.flatten(0, 2)
    table, typical = transformer.embed_tokens, some_positions(features[:training])
    start = model.vocabulary.image_start
    transformer.embed_tokens = ContinuousEmbedding(table, start, flat, typical)
    codes = torch.arange(len(flat)).view(len(features), -1)
    vectors = torch.cat([part.float().mean((1, 2)) for part in features.split(100)])
    return Reading(model, codes, vectors, {})


class ContinuousEmbedding(nn.Module):
    """In the place of the embeddings: a code is embedded by a projection of its features.

    A code is the number of a position among those of all photos. So no two photos have the same
    codes, and decoding, which reads a common beginning of prompts once, keeps photos apart. The ids
    of codes lie beyond the table, and nothing predicts them.

    Args:
        table: of all other ids.
        image_start: the id of code 0.
        features: float16[N h w, D].
        typical: float32[P, D]: each channel is scaled by their mean and deviation.
    """

    def __init__(
        self, table: nn.Embedding, image_start: int, features: Tensor, typical: Tensor
    ) -> None:
        super().__init__()
        self.table, self.image_start = table, image_start
        self.register_buffer("features", features)
        self.register_buffer("mean", typical.mean(0))
        self.register_buffer("std", typical.std(0).clamp(min=1e-6))
        self.projection = nn.Linear(features.shape[1], table.embedding_dim)
        # As large as other embeddings at the start.
        nn.init.normal_(self.projection.weight, std=0.02 / math.sqrt(features.shape[1]))
        nn.init.zeros_(self.projection.bias)

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """int64[...] -> float[..., W]"""
        is_code = ids >= self.image_start
        embedded = self.table(ids.masked_fill(is_code, 0))
        features = self.features[ids[is_code] - self.image_start].float()
        projected = self.projection((features - self.mean) / self.std)
        embedded[is_code] = projected.to(embedded.dtype)
        return embedded


def train(reading: Reading, photos: Photos, steps: int, name: str) -> dict[str, float]:
    """Train the captioner. Returns what that took, and its loss on val."""
    network, config = reading.model.network, reading.model.config
    network.transformer.dropout, network.label_smoothing = DROPOUT, LABEL_SMOOTHING
    length = len(config.layout.indices(config.reads))
    builder = BatchBuilder(
        network.vocabulary,
        OBJECTIVES,
        config.templates,
        reading.model.text_tokenizer.encode,
        config.layout,
        config.reads,
        config.draws,
        length + CAPTIONS_ROOM,
        captions_per_image=CAPTIONS,
    )

    def build(numbers: Sequence[int], epoch: int) -> TrainingBatch:
        samples = []
        for number in numbers:
            sample, codes = photos.samples[number], reading.codes[[number]].numpy()
            seed = sample_seed(0, epoch, sample.key)
            samples.append(TrainingSample(sample.key, sample.record, codes, seed))
        return builder.build(samples)

    start = time.perf_counter()
    tokens = fit_in_memory(network, build, photos.training, BATCH, steps, LEARNING_RATE, name)
    minutes = (time.perf_counter() - start) / 60
    val = torch.arange(photos.training, len(photos.samples)).split(BATCH)
    with torch.inference_mode():
        parts = [network(build(part.tolist(), 0).to(network.device))[1] for part in val]
    return {
        "tokens_per_photo": length,
        "tokens_trained": tokens,
        "device": str(network.device),
        "minutes_training": minutes,
        "caption_nats": sum(float(part["caption"]) for part in parts) / len(parts),
    }


def look_up(vectors: NDArray[np.float32], photos: Photos) -> dict[str, float]:
    """The CIDEr of the lookup on val; vectors: [N, D]."""
    train, val = photos.captions[: photos.training], photos.captions[photos.training :]
    known = [[ptb_tokenize(text) for text in captions] for captions in train]
    found = Lookup(vectors[: photos.training], known)(vectors[photos.training :])
    keys = [str(number) for number in range(len(val))]
    guesses, references = (dict(zip(keys, texts, strict=True)) for texts in (found, val))
    scores = score_captions(guesses, references)["per_image"]
    each = [scores[key]["CIDEr"] for key in keys]
    low, high = interval(each)
    return {"value": sum(each) / len(each), "low": low, "high": high, "n": len(each)}


def measure(row: Row, arguments: argparse.Namespace, photos: Photos, cache: Path) -> dict[str, Any]:
    """All figures of a row. cache: the file of its features."""
    torch.manual_seed(0)
    texts = chain.from_iterable(photos.captions[: photos.training])
    text = TextTokenizer.train(texts, VOCABULARY_SIZE)
    if row.encoder:
        features = features_of(row, photos, cache)
        read = read_continuous if row.codes == "continuous" else read_codes
        reading = read(row, features, photos.training, text)
    else:
        reading = read_pixels(photos, load_image_tokenizer(arguments.pixels), text)
    model = reading.model.to(arguments.device)
    trained = train(reading, photos, arguments.steps, row.name)
    start = time.perf_counter()
    subject = Subject(model, photos.samples[photos.training :], BATCH, yardsticks=False)
    subject.codes = reading.codes[photos.training :]
    scores = {"lookup": look_up(reading.vectors.numpy(), photos)}
    scores |= evaluate(Captioning(), subject) | evaluate(Retrieval(), subject)
    minutes = (time.perf_counter() - start) / 60
    return {**reading.figures, **trained, "minutes_measuring": minutes, "scores": scores}


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a row."""
    scores = result["scores"]

    def mean(name: str) -> str:
        return "{value:.3f} ({low:.3f} to {high:.3f})".format(**scores[name])

    return {
        "read as": result["row"],
        "codes": result["tokens_per_photo"],
        "variance lost": result.get("variance_lost", ""),
        "lookup": mean("lookup"),
        "CIDEr, greedy": mean("CIDEr"),
        "CIDEr, 5 beams": mean("CIDEr_beams"),
        "distinct, greedy": round(scores["distinct_captions"]["value"]),
        "distinct, 5 beams": round(scores["distinct_captions_beams"]["value"]),
        "recall@10, text to image": scores["text_to_image@10"]["value"],
        "image to text": scores["image_to_text@10"]["value"],
        "nats of a caption's token": result["caption_nats"],
        "minutes, fitting": result.get("minutes_fitting", ""),
        "training": result["minutes_training"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="photos with captions: shards")
    parser.add_argument("--encoders", nargs="*", default=[], help="KIND:MODEL[=FILE]")
    parser.add_argument("--pixels", default="starter", help="whose level of detail is compared")
    parser.add_argument("--out", type=Path, default=Path("runs/meaning-table"))
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", default=["*"])
    parser.add_argument("--steps", type=int, default=1000, help=f"of {BATCH} photos")
    parser.add_argument("--limit", type=int, help="photos of each split (default: all)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--device", default="cpu", help="where captioners train and write")
    arguments = parser.parse_args()
    arguments.pixels = part_of(arguments.pixels, "image_tokenizer")
    rows = [Row(), *(Row(*parts) for parts in product(arguments.encoders, STAGES, CODES))]
    chosen = [row for row in rows if any(fnmatchcase(row.name, p) for p in arguments.rows)]
    if not chosen:
        parser.error(f"--rows: there is {', '.join(row.name for row in rows)}")
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    photos = Photos.read(arguments.data, arguments.limit)
    results = []
    for row in chosen:
        seen = {**photos.origin, "weights": weights_of(row, arguments.pixels)}
        cache = file_of(arguments.out, row.name.rpartition("/")[0], seen, "safetensors")
        settings = {**seen, "steps": arguments.steps}
        run = partial(measure, row, arguments, photos, cache)
        results.append(measured_once(arguments.out, row.name, settings, run))
        print(json.dumps(shown(results[-1])), file=sys.stderr, flush=True)
    print(markdown([shown(result) for result in results]))
    print(json.dumps({"steps": arguments.steps, "rows": results}))


if __name__ == "__main__":
    main()
