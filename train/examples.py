"""Samples of shard folders as training examples: images of one size, or codes, and records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from multimodal.data.documents import codes_in, document_of, images_in, is_plain_text
from multimodal.data.images import Fit, augment_image, fit_image, open_image
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards
from multimodal.devices import moved
from multimodal.seeds import sample_seed
from multimodal.train.mixing.few_shot import FewShot
from multimodal.train.sample_order import Item

NEIGHBOURS = 64  # an unusable sample is replaced by one of those after it


@dataclass(frozen=True)
class Note:
    """A sample that was left out, or whose text was cut, and why."""

    source: int  # the number of its folder
    key: str
    reason: str


@dataclass
class Examples:
    """One rank's share of a global batch.

    Shapes: B samples, I images (a document may have any number of images), n codes of an image.

    Args:
        keys: B names.
        images: uint8[I, 3, H, W], the images of all samples in their order. int64[I, n] if the
            shards hold codes.
        records: B dictionaries, as in KEY.json.
        seeds: B numbers from (seed, epoch, key), for random choices during the step.
        sources: B numbers of the folders the samples are from.
        documents: B lists. Of a document its texts, with None for each image. Of a single image an
            empty list.
        drawn: B booleans, whether the image may be learned to be drawn.
        notes: what was left out or cut on the way to this batch.
    """

    keys: list[str]
    images: Tensor
    records: list[dict[str, Any]]
    seeds: list[int]
    sources: list[int]
    documents: list[list[str | None]]
    drawn: list[bool]
    notes: list[Note] = field(default_factory=list)

    @property
    def codes(self) -> Tensor | None:
        """int64[I, n] if the shards hold codes, else None."""
        return self.images if self.images.ndim == 2 else None

    @property
    def image_counts(self) -> list[int]:
        """B numbers: how many images each sample has."""
        return [parts.count(None) if parts else 1 for parts in self.documents]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Examples":
        """With the images on a device. Codes stay where they are: the host makes rows of them.

        Lightning gives ``non_blocking`` to tensors alone. The host waits for no copy here.
        """
        if self.codes is not None:
            return self
        return replace(self, images=moved(self.images, device))

    def pixels(self) -> Tensor:
        """float[I, 3, H, W] in [-1, 1]"""
        assert self.codes is None, "check_codes refuses shards of codes where pixels are needed"
        return self.images.float() / 127.5 - 1


class ShardDataset(Dataset[dict[str, Any]]):
    """The samples of several shard folders, one folder after the other.

    Args:
        sources: the shards of each folder.
        image_size: pixels of a side.
        fit: how other images are made square.
        seed: of the crops, and of what each example draws later.
        crop_scale: the smallest share of the area that a random crop covers.
        mirror: mirror half of the crops.
        augmented: for each folder, whether its images are cropped. By default all are if
            ``crop_scale`` is below 1.
        drawn: for each folder, whether its images are learned to be drawn. By default all are.
        check: raises ValueError for a sample, by key and record, that the training cannot use.
        replaced: an unusable sample is replaced by the one after it, so that each rank has as many
            samples as the others. If not, it is left out.
        few_shot: which samples become few-shot documents. By default none.
    """

    def __init__(
        self,
        sources: list[Shards],
        image_size: int,
        fit: Fit,
        seed: int,
        crop_scale: float = 1.0,
        mirror: bool = False,
        augmented: Sequence[bool] | None = None,
        drawn: Sequence[bool] | None = None,
        check: Callable[[str, dict[str, Any]], None] | None = None,
        replaced: bool = True,
        few_shot: FewShot | None = None,
    ) -> None:
        self.sources, self.few_shot = sources, few_shot
        folders = [source.folder for source in sources]
        # How often each folder was named before. Each copy has its own seeds.
        self.copies = [folders[:number].count(folder) for number, folder in enumerate(folders)]
        self.augmented = [crop_scale < 1] * len(sources) if augmented is None else augmented
        self.drawn = [True] * len(sources) if drawn is None else drawn
        self.ends = np.cumsum([len(source) for source in sources])
        self.holds_codes = any(source.encoding is not None for source in sources)
        self.image_size, self.fit, self.seed = image_size, fit, seed
        self.crop_scale, self.mirror = crop_scale, mirror
        self.check, self.replaced = check, replaced

    def __len__(self) -> int:
        return int(self.ends[-1])

    def announce(self, items: Sequence[Item]) -> None:
        """Begin to bring the samples of remote folders near, and return at once."""
        numbers: dict[int, list[int]] = {}
        for _, number in items:
            source, inside = self._place(number)
            numbers.setdefault(source, []).append(inside)
        for source, inside_it in numbers.items():
            self.sources[source].announce(inside_it)

    def _place(self, number: int) -> tuple[int, int]:
        """(number of the source, number of the sample in it)"""
        source = int(np.searchsorted(self.ends, number, side="right"))
        return source, number - (int(self.ends[source - 1]) if source else 0)

    def __getitem__(self, item: Item) -> dict[str, Any]:
        epoch, number = item  # with weights, the pass over the folder instead of the epoch
        source, inside = self._place(number)
        shards = self.sources[source]
        notes: list[Note] = []
        for further in range(NEIGHBOURS if self.replaced else 1):
            place = (inside + further) % len(shards)
            sample = shards[place]
            try:
                example = self._read(sample, source, epoch)
                if self.few_shot is not None:
                    read = partial(self._read_number, source, epoch)
                    example = self.few_shot.document(example, place, len(shards), read)
                return {**example, "notes": notes}
            except ValueError as error:
                notes.append(Note(source, sample.key, str(error)))
        if self.replaced:
            raise ValueError(
                f"{shards.folder}: none of {NEIGHBOURS} samples in a row can be used: "
                f"{notes[0].reason}"
            )
        return {"notes": notes}

    def _read_number(self, source: int, epoch: int, number: int) -> dict[str, Any]:
        return self._read(self.sources[source][number], source, epoch)

    def _read(self, sample: Sample, source: int, epoch: int) -> dict[str, Any]:
        """A sample as an example. Raises ``ValueError`` if it cannot be used."""
        copy, encoding = self.copies[source], self.sources[source].encoding
        seed = sample_seed(self.seed, epoch, f"{copy}/{sample.key}" if copy else sample.key)
        document, record = document_of(sample), sample.record
        # The images of a preference are alternatives, and no document to read through.
        if self.check is not None and (not document or "preferences" in record):
            self.check(sample.key, record)
        images: list[NDArray[Any]]
        if encoding is not None:
            images = [
                select_encoding(codes, encoding, seed + position)
                for position, codes in enumerate(codes_in(sample))
            ]
        else:
            found = images_in(sample)
            if found and self.holds_codes:
                raise ValueError("it has images, among plain texts, and other folders have codes")
            images = [
                self._image(data, self.augmented[source], seed + position)
                for position, data in enumerate(found)
            ]
        return {
            "key": sample.key,
            "images": images,
            "record": record,
            "seed": seed,
            "source": source,
            "document": document,
            "drawn": self.drawn[source],
        }

    def _image(self, data: bytes, augmented: bool, seed: int) -> NDArray[np.uint8]:
        """uint8[H, W, 3]"""
        image = open_image(data)
        if not augmented:
            return np.asarray(fit_image(image, self.image_size, self.fit))
        rng = np.random.default_rng(seed)
        scale = (self.crop_scale, 1.0)
        return np.asarray(augment_image(image, self.image_size, rng, scale, flip=self.mirror))

    def collate(self, samples: list[dict[str, Any]]) -> Examples:
        notes = [note for sample in samples for note in sample["notes"]]
        samples = [sample for sample in samples if "key" in sample]
        arrays = [image for sample in samples for image in sample["images"]]
        if arrays:
            images = torch.from_numpy(np.stack(arrays))
        else:  # documents without an image
            images = torch.zeros(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
        return Examples(
            keys=[sample["key"] for sample in samples],
            images=images if images.ndim == 2 else images.permute(0, 3, 1, 2).contiguous(),
            records=[sample["record"] for sample in samples],
            seeds=[sample["seed"] for sample in samples],
            sources=[sample["source"] for sample in samples],
            documents=[sample["document"] for sample in samples],
            drawn=[sample["drawn"] for sample in samples],
            notes=notes,
        )


def select_encoding(
    codes: NDArray[np.int64], encoding: dict[str, Any], seed: int
) -> NDArray[np.int64]:
    """Choose one of the A encodings of an image at random.

    Args:
        codes: int64[A, n].
        encoding: what the manifest says: ``codes_per_image`` and ``codebook_size``.
        seed: decides the choice.

    Returns:
        int64[n].

    Raises:
        ValueError: if the codes do not match the manifest.
    """
    # Making a generator takes longer than reading the codes: skip it for a single encoding.
    index = int(np.random.default_rng(seed).integers(len(codes))) if len(codes) > 1 else 0
    selected = codes[index]
    count, size = encoding["codes_per_image"], encoding["codebook_size"]
    if selected.shape != (count,) or selected.max() >= size:
        raise ValueError(
            f"codes of shape {selected.shape} up to {selected.max()}, the manifest says "
            f"{count} of {size}"
        )
    return selected


def holds_plain_texts(source: Shards) -> bool:
    """Whether a folder holds plain texts, as its first sample says."""
    return len(source) > 0 and is_plain_text(source[0].record)


def check_codes(shards: list[Shards], expected_codes: str | None, crops: bool) -> None:
    """Check that training can use shards that hold codes.

    Args:
        shards: of all folders.
        expected_codes: fingerprint of the codes that the model reads. None: it needs pixels.
        crops: whether training crops images.

    Raises:
        ValueError: if the shards hold codes that this training cannot use.
    """
    encoded = [source for source in shards if source.encoding is not None]
    if not encoded:
        return
    folder = encoded[0].folder
    if expected_codes is None:
        raise ValueError(f"{folder}: holds codes, and an image tokenizer is trained on images")
    images = [s.folder for s in shards if s.encoding is None and not holds_plain_texts(s)]
    if images:
        raise ValueError(
            f"{folder}: holds codes, and {min(images)} images: encode all folders or none"
        )
    for source in encoded:
        assert source.encoding is not None
        if (fingerprint := source.encoding.get("fingerprint")) != expected_codes:
            raise ValueError(
                f"{source.folder}: its codes are of another image tokenizer ({fingerprint}; the "
                f"model reads codes {expected_codes}); encode the shards anew: multimodal "
                "tokenizer encode"
            )
    if crops:
        raise ValueError(
            f"{folder}: holds codes, which cannot be cropped: leave out data.crop_scale, and give "
            "it to: multimodal tokenizer encode"
        )
