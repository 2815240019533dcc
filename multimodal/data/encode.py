"""Shards of codes in the place of images: encoded once, then read many times faster.

``KEY.codes.npy`` is ``uint16[A, h, w]`` (``uint32`` for more than 65,536 codes): A encodings of the
image, of which training takes one by chance, and of a document ``KEY.0.codes.npy`` and on; the
record stays as it is. The manifest says
which image tokenizer made them: codes mean nothing to another.

The shard is the unit of work: each is written whole or not at all, and a run that was stopped goes
on with the shards that are missing. The same input gives the same bytes.
"""

import io
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
from multimodal.data.parallel import Engine, map_ordered, map_units, rank_and_world_size
from multimodal.data.samples import CODES, Sample
from multimodal.data.seeds import sample_seed
from multimodal.data.shards import (
    MANIFEST,
    Shards,
    index_shard,
    read_manifest,
    write_manifest,
    write_tar,
)
from multimodal.files import atomic_file
from multimodal.tokenizers.image import VQTokenizer, load_image_tokenizer

SETTINGS = "encoding.json"  # what a folder that is not finished yet is made with
TOKENIZER = ".tokenizer-"  # its folder, for other processes
AT_ONCE = 512  # pictures, at most
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Encoding:
    """How codes came about; the manifest holds it under ``image_tokenizer``.

    fingerprint: of the tokenizer's codes (``codes_fingerprint``); codebook_size, image_size, fit,
        grid: of the tokenizer; precision: of the encoder.
    encodings: A, of training images; crop_scale, mirror, seed: of their crops, which are squashed
        whatever the fit, as in training (1: no crops);
    train_split: the split they are for; images of others are encoded once, whole.
    """

    fingerprint: str
    codebook_size: int
    image_size: int
    fit: Fit
    grid: int
    precision: Precision = "float32"
    encodings: int = 1
    crop_scale: float = 1.0
    mirror: bool = False
    seed: int = 0
    train_split: str = "train"

    def __post_init__(self) -> None:
        if self.encodings < 1:
            raise ValueError(f"encodings={self.encodings}: expected at least 1")
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
    def by(cls, tokenizer: VQTokenizer, **options: Any) -> "Encoding":
        config, codes = tokenizer.config, tokenizer.codes_fingerprint
        return cls(codes, tokenizer.codebook_size, config.image_size, config.fit, config.grid,
                   **options)  # fmt: skip

    def pictures(self, key: str, data: bytes, split: str) -> NDArray[np.uint8]:
        """uint8[A, H, W, 3]: what is to be encoded of an image of the sample"""
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
    """One shard that is to be encoded; tokenizer: a folder, for processes that have none yet."""

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
    tokenizer: VQTokenizer,
    encoding: Encoding,
    batch_size: int = 64,
    decoders: int = 2,
    on_sample: Callable[[int], object] = lambda count: None,
    engine: Engine = "processes",
    workers: int = 1,
) -> dict[str, Any] | None:
    """Write the shards of ``source`` with codes for images; returns the manifest.

    decoders: threads that decode images while others are encoded, 0 for none.
    engine, workers: who encodes shards: processes (1: this one), or tasks of Ray; under torchrun,
        the ranks share the shards, and only the first gets the manifest.
    out: a folder that is not there, is empty, or holds what an earlier call with the same arguments
    left. Errors: ``ValueError`` for any other, and for an image that cannot be read, by its key.
    """
    source, out = Path(source), Path(out)
    about = read_manifest(source)
    splits = sorted({str(entry["split"]) for entry in about["shards"]})
    if encoding.crop_scale < 1 and encoding.train_split not in splits:
        raise ValueError(
            f"{source}: no split {encoding.train_split!r} to crop; it has {', '.join(splits)}"
        )
    settings = {"source": [entry["sha256"] for entry in about["shards"]], **asdict(encoding)}
    if (out / MANIFEST).is_file() and not rank_and_world_size()[0]:
        raise ValueError(f"{out}: not empty (it is complete); give a new folder")
    with job_folder(out, out / SETTINGS, settings, result=out / MANIFEST) as first:
        if not first and (out / MANIFEST).is_file():
            return None  # the others were faster
        shared: dict[str, Any] = {}
        work: Callable[[EncodedShard], int] = partial(encode_shard, tokenizer, on_sample)
        if workers > 1 or engine != "processes":
            folder = out / f"{TOKENIZER}{rank_and_world_size()[0]}"  # where all can read it
            device = next(tokenizer.parameters()).device
            tokenizer.save(folder)
            threads = max(1, torch.get_num_threads() // workers)
            shared = {"tokenizer": str(folder), "device": str(device), "threads": threads}
            work = encode_shard_by_folder
        shards = [
            EncodedShard(source, out, str(entry["name"]), str(entry["split"]), encoding,
                         batch_size, decoders, **shared)
            for entry in about["shards"]
        ]  # fmt: skip
        for count in map_units(work, shards, engine, workers, done=EncodedShard.done):
            on_sample(count)
        if not first:
            return None
        entries = [index_shard(out / shard.name) for shard in shards]
        ours = ("format", "version", "shards", "made_by")
        kept = {k: v for k, v in about.items() if k not in ours}
        kept["made_by"] = "multimodal.data.encode.encode_shards"
        kept["image_tokenizer"] = asdict(encoding)
        write_manifest(out, entries, **kept)
        for folder in out.glob(f"{TOKENIZER}*"):
            shutil.rmtree(folder)
        for part in out.glob(".*.part"):  # of processes that were killed
            part.unlink(missing_ok=True)
        (out / SETTINGS).unlink()
    return read_manifest(out)


def encode_shard(
    tokenizer: VQTokenizer, on_sample: Callable[[int], object], shard: EncodedShard
) -> int:
    """Write one shard of codes, unless it is there.

    Returns how many samples ``on_sample`` was not told of: those of a shard that was there.
    """
    samples = Shards(shard.source, only=shard.name)
    if shard.done():
        return len(samples)
    with atomic_file(shard.out / shard.name, shared=True) as part:
        write_tar(part, _encoded(samples, shard, tokenizer, on_sample))
    return 0


def encode_shard_by_folder(shard: EncodedShard) -> int:
    """``encode_shard`` in a process of its own; returns the samples of the shard."""
    torch.set_num_threads(shard.threads)
    encode_shard(_tokenizer(shard.tokenizer, shard.device), lambda count: None, shard)
    return len(Shards(shard.source, only=shard.name))


@lru_cache(1)
def _tokenizer(folder: str, device: str) -> VQTokenizer:
    return load_image_tokenizer(folder).to(device)


def _encoded(
    shards: Shards,
    shard: EncodedShard,
    tokenizer: VQTokenizer,
    on_sample: Callable[[int], object],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of every sample of a shard, encoded in batches."""
    encoding = shard.encoding

    def ready(sample: Sample) -> tuple[Sample, list[NDArray[np.uint8]]]:
        try:
            document_of(sample)  # is as it should be
            images = images_in(sample)
            keys = [sample.key, *(f"{n}/{sample.key}" for n in range(1, len(images)))]
            return sample, [encoding.pictures(key, data, shard.split)
                            for key, data in zip(keys, images, strict=False)]  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{shards.folder}: sample {sample.key}: {error}") from error

    samples, pictures = list[Sample](), list[list[NDArray[np.uint8]]]()
    for number, (sample, its_pictures) in enumerate(
        map_ordered(ready, shards, shard.decoders), start=1
    ):
        samples.append(sample)
        pictures.append(its_pictures)
        images = list(chain.from_iterable(pictures))
        if sum(map(len, images)) >= shard.batch_size or number == len(shards):
            encoded = iter(encode_images(tokenizer, images, encoding.precision))
            for one, its_images in zip(samples, pictures, strict=True):
                names = [CODES]
                if document_of(one):
                    names = [f"{n}.{CODES}" for n in range(len(its_images))]
                codes = {name: codes_to_bytes(next(encoded), tokenizer.codebook_size)
                         for name in names}  # fmt: skip
                text = {k: v for k, v in one.members.items() if k in ("json", "txt")}
                yield one.key, {**codes, **text}
            on_sample(len(samples))
            samples, pictures = [], []


def encode_images(
    tokenizer: VQTokenizer, images: list[NDArray[np.uint8]], precision: Precision
) -> list[NDArray[np.int64]]:
    """uint8[A, H, W, 3] each -> codes: int64[A, h, w] each, all in one batch"""
    if not images:
        return []
    every = np.concatenate(images)  # of one document any number
    some = [every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE)]
    codes = np.concatenate([encode_pictures(tokenizer, part, precision) for part in some])
    return np.split(codes, np.cumsum([len(image) for image in images])[:-1])


@torch.inference_mode()
def encode_pictures(
    tokenizer: VQTokenizer, pictures: NDArray[np.uint8], precision: Precision
) -> NDArray[np.int64]:
    """uint8[B, H, W, 3] -> codes: int64[B, h, w]"""
    device = next(tokenizer.parameters()).device
    images = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    # Convolutions on a GPU would otherwise be in TF32, which is neither of the two.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        codes: NDArray[np.int64] = tokenizer.encode(images).cpu().numpy()
    return codes


def codes_to_bytes(codes: NDArray[np.int64], codebook_size: int) -> bytes:
    """int64[A, h, w] as a .npy file of the smallest unsigned numbers that hold them."""
    file = io.BytesIO()
    small = np.uint16 if codebook_size <= 1 << 16 else np.uint32
    np.save(file, codes.astype(small), allow_pickle=False)
    return file.getvalue()
