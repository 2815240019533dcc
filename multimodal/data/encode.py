"""Shards of codes instead of images: encoded once, then read many times faster.

``KEY.codes.npy`` is ``uint16[A, n]`` (``uint32`` for more than 65,536 codes): A encodings of the
image, of which training draws one. The images of a document are in ``KEY.0.codes.npy``,
``KEY.1.codes.npy`` and so on. The record does not change. The manifest holds the fingerprint of the
image tokenizer: codes of one tokenizer mean nothing to another.

A sample that cannot be read is left out, and named in ``rejected.jsonl``.

The unit of work is a shard. A run that was stopped goes on with the shards that are missing. The
same input gives the same bytes.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from multimodal.data.documents import document_of, images_in
from multimodal.data.images import Fit, augment_image, fit_image, open_image
from multimodal.data.jobs import job_folder
from multimodal.data.parallel import (
    Engine,
    map_ordered,
    map_units,
)
from multimodal.data.samples import CODES, RECORD_MEMBERS, Sample
from multimodal.data.shards import (
    MANIFEST,
    Shards,
    index_shard,
    read_index,
    read_manifest,
    write_manifest,
    write_tar,
)
from multimodal.files import atomic_file, local_path
from multimodal.seeds import sample_seed
from multimodal.tokenizers.image import ImageTokenizer, load_image_tokenizer
from multimodal.torchrun import is_first_rank, rank_and_world_size

SETTINGS = "encoding.json"  # the arguments, in a folder that is not finished
TOKENIZER = ".tokenizer-"  # start of the name of a tokenizer folder for worker processes
MAX_BATCH = 512  # pictures
MAX_ENCODINGS = 1000  # of an image: its crops are in memory together
REJECTED, UNREADABLE = "rejected.jsonl", "unreadable image or text"
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Encoding:
    """How codes are made. The manifest holds it under ``image_tokenizer``.

    Attributes:
        fingerprint: ``codes_fingerprint`` of the tokenizer.
        codebook_size, image_size, fit, codes_per_image: of the tokenizer.
        precision: of the encoder.
        encodings: A, the number of encodings of an image of ``train_split``.
        crop_scale: least share of the area of a crop, in (0, 1]. 1 makes no crops. Crops are
            squashed to a square whatever ``fit`` is, as in training.
        mirror: whether half of the crops are mirrored.
        seed: of the crops.
        train_split: the split that gets crops. Images of other splits are encoded once, uncropped.

    Raises:
        ValueError: if a value is out of range.
    """

    fingerprint: str
    codebook_size: int
    image_size: int
    fit: Fit
    codes_per_image: int
    precision: Precision = "float32"
    encodings: int = 1
    crop_scale: float = 1.0
    mirror: bool = False
    seed: int = 0
    train_split: str = "train"

    def __post_init__(self) -> None:
        if not 1 <= self.encodings <= MAX_ENCODINGS:
            raise ValueError(f"encodings={self.encodings}: expected 1 to {MAX_ENCODINGS:,}")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(
                f"crop_scale={self.crop_scale}: expected a share of the area in (0, 1]"
            )
        if self.crop_scale == 1 and (self.encodings > 1 or self.mirror):
            raise ValueError(
                f"encodings={self.encodings}, mirror={self.mirror} are for crops: give a "
                "crop_scale below 1"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision={self.precision!r}: expected float32 or bfloat16")

    @classmethod
    def for_tokenizer(cls, tokenizer: ImageTokenizer, **options: Any) -> "Encoding":
        """The encoding of a tokenizer. ``options`` are the fields from ``precision`` on."""
        return cls(
            tokenizer.codes_fingerprint,
            tokenizer.codebook_size,
            tokenizer.image_size,
            tokenizer.fit,
            tokenizer.codes_per_image,
            **options,
        )

    def prepare(self, key: str, data: bytes, split: str) -> NDArray[np.uint8]:
        """The pictures to encode for one image.

        Args:
            key: seeds the crops. It differs between the images of a document.
            data: the image file.
            split: the split of the sample.

        Returns:
            uint8[A, H, W, 3].
        """
        image = open_image(data, name=key)
        if split != self.train_split or self.crop_scale == 1:
            return np.asarray(fit_image(image, self.image_size, self.fit))[None]
        scale = (self.crop_scale, 1.0)
        crops = []
        for number in range(self.encodings):
            rng = np.random.default_rng(sample_seed(self.seed, number, key))
            crops.append(augment_image(image, self.image_size, rng, scale, flip=self.mirror))
        return np.stack([np.asarray(crop) for crop in crops])


@dataclass(frozen=True)
class EncodedShard:
    """The work for one shard. A worker process loads ``tokenizer``, a folder."""

    source: Path
    out: Path
    name: str
    split: str
    encoding: Encoding
    batch_size: int
    decoders: int
    tokenizer: str = ""
    device: str = "cpu"
    threads: int = 0

    def done(self) -> bool:
        return (self.out / self.name).is_file()


def encode_shards(
    source: str | Path,
    out: str | Path,
    tokenizer: ImageTokenizer,
    encoding: Encoding,
    batch_size: int = 64,
    decoders: int = 2,
    on_sample: Callable[[int], object] = lambda count: None,
    engine: Engine = "processes",
    workers: int = 1,
) -> dict[str, Any] | None:
    """Write the shards of ``source`` again, with codes instead of images.

    Under torchrun the ranks share the shards.

    Args:
        source: a folder of shards with images.
        out: a folder that does not exist, is empty, or is left from an earlier call with the same
            arguments.
        tokenizer: encodes the images.
        encoding: how, see ``Encoding``.
        batch_size: pictures encoded at once.
        decoders: threads that decode images meanwhile. 0 decodes in this thread.
        on_sample: is called with a number of finished samples, to show progress.
        engine: what runs the workers, processes or ray.
        workers: number of processes or Ray tasks. 1 process works in this process.

    Returns:
        The manifest, or None on all ranks but the first. Its ``rejected`` counts the samples that
        could not be read as UNREADABLE.

    Raises:
        ValueError: if ``out`` holds anything else, or if no sample of a shard can be read.
    """
    source, out = Path(source), local_path(out)
    manifest = read_manifest(source)
    splits = sorted({str(entry["split"]) for entry in manifest["shards"]})
    if encoding.crop_scale < 1 and encoding.train_split not in splits:
        raise ValueError(
            f"{source}: no split {encoding.train_split!r} to crop; it has {', '.join(splits)}"
        )
    settings = {"source": [entry["sha256"] for entry in manifest["shards"]], **asdict(encoding)}
    if (out / MANIFEST).is_file() and is_first_rank():
        raise ValueError(f"{out}: not empty (it is complete); give a new folder")
    with job_folder(out, out / SETTINGS, settings, result=out / MANIFEST) as first:
        if not first and (out / MANIFEST).is_file():
            return None  # the other ranks finished first
        shared: dict[str, Any] = {}
        work: Callable[[EncodedShard], int] = partial(encode_shard, tokenizer, on_sample)
        if workers > 1 or engine != "processes":
            folder = out / f"{TOKENIZER}{rank_and_world_size()[0]}"  # all workers can read it here
            device = next(tokenizer.parameters()).device
            tokenizer.save(folder)
            threads = max(1, torch.get_num_threads() // workers)
            shared = {"tokenizer": str(folder), "device": str(device), "threads": threads}
            work = encode_shard_by_folder
        shards = [
            EncodedShard(
                source=source,
                out=out,
                name=str(entry["name"]),
                split=str(entry["split"]),
                encoding=encoding,
                batch_size=batch_size,
                decoders=decoders,
                **shared,
            )
            for entry in manifest["shards"]
        ]
        for count in map_units(work, shards, engine, workers, done=EncodedShard.done):
            on_sample(count)
        if not first:
            return None
        entries = [index_shard(out / shard.name) for shard in shards]
        rejected = [
            line
            for shard, before, now in zip(shards, manifest["shards"], entries, strict=True)
            if now["samples"] < before["samples"]
            for line in _rejected(shard)
        ]
        replaced = ("format", "version", "shards", "made_by")
        about = {k: v for k, v in manifest.items() if k not in replaced}
        about["made_by"] = "multimodal.data.encode.encode_shards"
        about["image_tokenizer"] = asdict(encoding)
        if rejected:
            about["rejected"] = {**(about.get("rejected") or {}), UNREADABLE: len(rejected)}
            with atomic_file(out / REJECTED) as part:
                lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in rejected]
                part.write_text("".join(lines), "utf-8", errors="backslashreplace")
        write_manifest(out, entries, **about)
        for folder in out.glob(f"{TOKENIZER}*"):
            shutil.rmtree(folder)
        for part in out.glob(".*.part"):  # left by processes that were killed
            part.unlink(missing_ok=True)
        (out / SETTINGS).unlink()
    return read_manifest(out)


def encode_shard(
    tokenizer: ImageTokenizer, on_sample: Callable[[int], object], shard: EncodedShard
) -> int:
    """Write one shard of codes, unless it exists.

    Returns:
        The number of samples that were not reported to ``on_sample``: all of a shard that existed,
        otherwise 0.
    """
    samples = Shards(shard.source, only=shard.name)
    if shard.done():
        return len(samples)
    with atomic_file(shard.out / shard.name, shared=True) as part:
        write_tar(part, _encoded(samples, shard, tokenizer, on_sample))
    return 0


def encode_shard_by_folder(shard: EncodedShard) -> int:
    """``encode_shard`` in a worker process. Returns the number of samples of the shard."""
    torch.set_num_threads(shard.threads)
    encode_shard(_tokenizer(shard.tokenizer, shard.device), lambda count: None, shard)
    return len(Shards(shard.source, only=shard.name))


@lru_cache(1)
def _tokenizer(folder: str, device: str) -> ImageTokenizer:
    return load_image_tokenizer(folder).to(device)


def _encoded(
    shards: Shards,
    shard: EncodedShard,
    tokenizer: ImageTokenizer,
    on_sample: Callable[[int], object],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of each sample of a shard, encoded in batches."""
    encoding = shard.encoding

    def prepare(sample: Sample) -> tuple[Sample, list[NDArray[np.uint8]] | None]:
        try:
            return sample, _pictures(sample, encoding, shard.split)
        except ValueError:
            return sample, None  # left out, see _rejected

    samples, pictures = list[Sample](), list[list[NDArray[np.uint8]]]()
    prepared = map_ordered(prepare, shards, shard.decoders)
    for number, (sample, sample_pictures) in enumerate(prepared, start=1):
        if sample_pictures is None:
            on_sample(1)
        else:
            samples.append(sample)
            pictures.append(sample_pictures)
        images = list(chain.from_iterable(pictures))
        if sum(map(len, images)) >= shard.batch_size or number == len(shards):
            encoded = iter(encode_images(tokenizer, images, encoding.precision))
            for encoded_sample, sample_images in zip(samples, pictures, strict=True):
                names = [CODES]
                if document_of(encoded_sample):
                    names = [f"{n}.{CODES}" for n in range(len(sample_images))]
                codes = {
                    name: codes_to_bytes(next(encoded), tokenizer.codebook_size) for name in names
                }
                members = encoded_sample.members.items()
                texts = {suffix: data for suffix, data in members if suffix in RECORD_MEMBERS}
                yield encoded_sample.key, {**codes, **texts}
            on_sample(len(samples))
            samples, pictures = [], []


def _pictures(sample: Sample, encoding: Encoding, split: str) -> list[NDArray[np.uint8]]:
    """The pictures of each image of a sample: uint8[A, H, W, 3].

    Raises:
        ValueError: if an image or the record cannot be read, or they do not match.
    """
    sample.read_record()
    document_of(sample)  # raises if the content does not match the images
    images = images_in(sample)
    keys = [sample.key, *(f"{n}/{sample.key}" for n in range(1, len(images)))]
    return [encoding.prepare(key, data, split) for key, data in zip(keys, images, strict=False)]


def _rejected(shard: EncodedShard) -> Iterator[dict[str, str]]:
    """A line for each sample that is not in the codes of a shard, with the reason."""
    kept = {sample["key"] for sample in read_index(shard.out / shard.name)}
    for sample in Shards(shard.source, only=shard.name):
        if sample.key not in kept:
            try:
                _pictures(sample, shard.encoding, shard.split)
                reason = ""
            except ValueError as error:
                reason = str(error)
            name = f"{shard.source / shard.name}: {sample.key}"
            yield {"sample": name, "reason": UNREADABLE, "detail": reason}


def encode_images(
    tokenizer: ImageTokenizer, images: list[NDArray[np.uint8]], precision: Precision
) -> list[NDArray[np.int64]]:
    """Encode the pictures of several images together.

    Args:
        tokenizer: encodes them.
        images: uint8[A, H, W, 3] each. A may differ.
        precision: of the encoder.

    Returns:
        int64[A, n] for each image.
    """
    if not images:
        return []
    pictures = np.concatenate(images)  # a document can have more than MAX_BATCH
    batches = [pictures[start : start + MAX_BATCH] for start in range(0, len(pictures), MAX_BATCH)]
    codes = np.concatenate([encode_pictures(tokenizer, batch, precision) for batch in batches])
    return np.split(codes, np.cumsum([len(image) for image in images])[:-1])


@torch.inference_mode()
def encode_pictures(
    tokenizer: ImageTokenizer, pictures: NDArray[np.uint8], precision: Precision
) -> NDArray[np.int64]:
    """Encode one batch.

    Args:
        tokenizer: encodes it, on its device.
        pictures: uint8[B, H, W, 3].
        precision: of the encoder.

    Returns:
        int64[B, n].
    """
    device = next(tokenizer.parameters()).device
    images = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return tokenizer.encode(images).cpu().numpy()


def codes_to_bytes(codes: NDArray[np.int64], codebook_size: int) -> bytes:
    """int64[A, n] as the bytes of a .npy file, of uint16 or, for large codebooks, uint32."""
    file = io.BytesIO()
    dtype = np.uint16 if codebook_size <= 1 << 16 else np.uint32
    np.save(file, codes.astype(dtype), allow_pickle=False)
    return file.getvalue()
