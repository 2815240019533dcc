"""The DataModule: an order that is a function of (seed, epoch), the same on any number of ranks.

A global batch is a fixed list of samples, dealt to the ranks in turn. What is random about a sample
(its crop, which caption, masks) comes from (seed, epoch, key) alone. So a run is a function of its
configuration, ``__len__`` is known, and the loader's state is two numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from multimodal.data.documents import codes_in, document_of, images_in
from multimodal.data.images import Fit, augment_image, fit_image, open_image
from multimodal.data.parallel import worker_context
from multimodal.data.remote import local_folder
from multimodal.data.seeds import sample_seed, stable_number
from multimodal.data.shards import Shards
from multimodal.train.sample_order import VERSION, Item, Order


@dataclass
class Examples:
    """One rank's share of a global batch.

    keys: B names; images: uint8[I, 3, H, W], those of all samples one after the other, or
    int64[I, n] of shards that hold codes in their place; records: B dicts as in KEY.json;
    seeds: B numbers from (seed, epoch, key), for what is drawn at random later; sources: B numbers
    of the folders they are from; documents: B lists of the texts of a document, with None for each
    of its images in turn, empty for a sample of one image.
    """

    keys: list[str]
    images: Tensor
    records: list[dict[str, Any]]
    seeds: list[int]
    sources: list[int]
    documents: list[list[str | None]]

    @property
    def codes(self) -> Tensor | None:
        """int64[I, n], where the shards hold codes."""
        return self.images if self.images.ndim == 2 else None

    @property
    def image_counts(self) -> list[int]:
        """B numbers: how many images each sample has."""
        return [parts.count(None) if parts else 1 for parts in self.documents]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Examples":
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))

    def pixels(self) -> Tensor:
        """float[I, 3, H, W] in [-1, 1]"""
        assert self.codes is None, "these are codes, and training on pixels was refused"
        return self.images.float() / 127.5 - 1


class ShardDataset(Dataset[dict[str, Any]]):
    """Samples of several shard folders in turn: images of one size, or codes, and records."""

    def __init__(
        self,
        sources: list[Shards],
        image_size: int,
        fit: Fit,
        seed: int,
        crop_scale: float = 1.0,
        mirror: bool = False,
        augmented: Sequence[bool] | None = None,
    ) -> None:
        self.sources = sources
        folders = [source.folder for source in sources]
        # How often each folder was named before: a copy has seeds of its own.
        self.copies = [folders[:number].count(folder) for number, folder in enumerate(folders)]
        self.augmented = [crop_scale < 1] * len(sources) if augmented is None else augmented
        self.ends = np.cumsum([len(source) for source in sources])
        self.image_size, self.fit, self.seed = image_size, fit, seed
        self.crop_scale, self.mirror = crop_scale, mirror

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, item: Item) -> dict[str, Any]:
        epoch, number = item  # of a source that is weighted, the pass over its samples
        source = int(np.searchsorted(self.ends, number, side="right"))
        start = int(self.ends[source - 1]) if source else 0
        sample = self.sources[source][number - start]
        copy = self.copies[source]
        seed = sample_seed(self.seed, epoch, f"{copy}/{sample.key}" if copy else sample.key)
        encoding = self.sources[source].encoding
        try:
            document = document_of(sample)
            images: list[NDArray[Any]]
            if encoding is not None:
                images = [select_encoding(codes, encoding, seed + number)
                          for number, codes in enumerate(codes_in(sample))]  # fmt: skip
            else:
                images = [self._image(data, self.augmented[source], seed + number)
                          for number, data in enumerate(images_in(sample))]  # fmt: skip
            record = sample.record
        except ValueError as error:
            folder = self.sources[source].folder
            raise ValueError(f"{folder}: sample {sample.key}: {error}") from error
        return {"key": sample.key, "images": images, "record": record, "seed": seed,
                "source": source, "document": document}  # fmt: skip

    def _image(self, data: bytes, augmented: bool, seed: int) -> NDArray[np.uint8]:
        """uint8[H, W, 3]"""
        image = open_image(data)
        if not augmented:
            return np.asarray(fit_image(image, self.image_size, self.fit))
        rng = np.random.default_rng(seed)
        scale = (self.crop_scale, 1.0)
        return np.asarray(augment_image(image, self.image_size, rng, scale, flip=self.mirror))

    def collate(self, samples: list[dict[str, Any]]) -> Examples:
        """Samples, as a batch."""
        every = [image for sample in samples for image in sample["images"]]
        if every:
            images = torch.from_numpy(np.stack(every))
        else:  # plain texts alone
            images = torch.zeros(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
        return Examples(
            keys=[sample["key"] for sample in samples],
            images=images if images.ndim == 2 else images.permute(0, 3, 1, 2).contiguous(),
            records=[sample["record"] for sample in samples],
            seeds=[sample["seed"] for sample in samples],
            sources=[sample["source"] for sample in samples],
            documents=[sample["document"] for sample in samples],
        )


def select_encoding(
    codes: NDArray[np.int64], encoding: dict[str, Any], seed: int
) -> NDArray[np.int64]:
    """One of the encodings of an image, int64[A, h, w] -> int64[n].

    Errors: ``ValueError`` for codes that are not as the manifest says."""
    # A generator costs more than the codes: none where there is nothing to choose.
    which = int(np.random.default_rng(seed).integers(len(codes))) if len(codes) > 1 else 0
    chosen = codes[which]
    grid, size = encoding["grid"], encoding["codebook_size"]
    if chosen.shape != (grid, grid) or chosen.max() >= size:
        raise ValueError(
            f"codes of shape {chosen.shape} up to {chosen.max()}, the manifest says "
            f"{grid} x {grid} of {size}"
        )
    flat: NDArray[np.int64] = chosen.ravel()
    return flat


class GlobalBatches(Sampler[list[Item]]):
    """Yields this rank's share of each global batch: a function of (seed, epoch, step).

    An order that is shuffled is for training: what is left over at its end is dropped.
    """

    def __init__(
        self, order: Order, global_batch_size: int, *, rank: int = 0, world_size: int = 1,
        limit: int = 0,
    ) -> None:  # fmt: skip
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} is not a multiple of {world_size} ranks"
            )
        if order.shuffle and len(order) < global_batch_size:
            raise ValueError(
                f"{len(order)} samples are fewer than one global batch of {global_batch_size}: "
                "give more data or a smaller global_batch_size"
            )
        self.order, self.global_batch_size = order, global_batch_size
        self.size = min(len(order), limit or len(order))
        if not order.shuffle and (over := self.size % world_size):
            # Ranks that are given different numbers of samples would wait for one another.
            rank_zero_warn(
                f"the last {over} of {self.size} samples cannot be dealt to {world_size} ranks "
                "alike: they are not measured"
            )
            self.size -= over
            if not self.size:
                raise ValueError(f"{over} samples are too few for {world_size} ranks")
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = (0, 0)  # epoch, and batches of it that are done

    @property
    def sampler(self) -> "GlobalBatches":
        """Lightning calls ``set_epoch`` on ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        # Measuring asks the same questions every time: the same captions, the same masks.
        self.epoch = epoch if self.order.shuffle else 0

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.global_batch_size)
        return full + bool(rest and not self.order.shuffle)

    @property
    def skipped(self) -> int:
        """Batches of this epoch that were done before a resume."""
        epoch, batches = self.start
        return batches if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[list[Item]]:
        for batch in range(self.skipped, len(self)):
            start = batch * self.global_batch_size
            stop = min(self.size, start + self.global_batch_size)
            yield self.order.items(self.epoch, start, stop)[self.rank :: self.world_size]


class GlobalBatchLoader(DataLoader[Any]):
    """A DataLoader whose state is (epoch, batches done): the same on every rank.

    The state goes with what the order is a function of; where that is another, it is refused.
    """

    batch_sampler: GlobalBatches
    dataset: ShardDataset

    def __init__(self, dataset: ShardDataset, batches: GlobalBatches, workers: int) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=dataset.collate,
            multiprocessing_context=worker_context(__name__) if workers else None,
            persistent_workers=False,
        )
        self._done = (0, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator over torch's
        epoch, first = self.batch_sampler.epoch, self.batch_sampler.skipped
        for number, batch in enumerate(super().__iter__(), start=first + 1):
            self._done = (epoch, number)
            yield batch

    @property
    def order_of(self) -> dict[str, Any]:
        """What the order of the samples is a function of."""
        batches = self.batch_sampler
        weights = batches.order.weights
        return {
            "version": VERSION,
            "seed": batches.order.seed,
            "global_batch_size": batches.global_batch_size,
            "samples": len(batches.order),
            "weights": None if weights is None else [float(weight) for weight in weights],
            "shards": stable_number("".join(one.fingerprint for one in self.dataset.sources)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._done[0], "batches": self._done[1], "order_of": self.order_of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before, now = state.get("order_of", {}), self.order_of
        changed = [name for name in now if before.get(name) != now[name]]
        if changed and self.batch_sampler.order.shuffle:
            was = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)
            raise ValueError(
                f"the data are not those of the checkpoint ({was}), so it is not known which "
                "samples were seen; to go on with its weights alone, use --init_from"
            )
        self.batch_sampler.start = self._done = (state["epoch"], state["batches"])


class LoaderIterable:
    """A loader as a plain iterable: to predict, Lightning rebuilds DataLoaders, but cannot ours."""

    def __init__(self, loader: GlobalBatchLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def check_codes(shards: list[Shards], expected_codes: str | None, crops: bool) -> None:
    """Errors: ``ValueError`` where shards hold codes that this training cannot use.

    expected_codes: fingerprint of the codes it reads; None: it reads pixels.
    """
    encoded = [one for one in shards if one.encoding is not None]
    if not encoded:
        return
    folder = encoded[0].folder
    if expected_codes is None:
        raise ValueError(f"{folder}: holds codes, and an image tokenizer is trained on images")
    if len(encoded) < len(shards):
        others = {one.folder for one in shards} - {one.folder for one in encoded}
        raise ValueError(
            f"{folder}: holds codes, and {min(others)} images: encode all folders or none"
        )
    for one in encoded:
        assert one.encoding is not None
        if (made_by := one.encoding.get("fingerprint")) != expected_codes:
            raise ValueError(
                f"{one.folder}: its codes are of another image tokenizer ({made_by}; the model "
                f"reads codes {expected_codes}); encode the shards anew: multimodal tokenizer "
                "encode"
            )
    if crops:
        raise ValueError(
            f"{folder}: holds codes, which cannot be cropped: leave out data.crop_scale, and give "
            "it to: multimodal tokenizer encode"
        )


class ShardData(L.LightningDataModule):
    """Shard folders for ``fit``, ``validate``, ``test`` and ``predict``.

    The module that it feeds says how images are made square, ``preprocessing -> (size, fit)``, and
    of which image tokenizer it could read codes, ``expected_codes -> fingerprint or None``.

    Args:
        folders: shard folders with a manifest, or their addresses (s3://...); their samples are put
            together. One that is named twice is seen twice in each epoch, with other crops and
            captions.
        train_split, val_split: names of splits, as in ``train-0000.tar``.
        crop_scale: training crops cover a random share of the image, from this on; 1 = no crops.
        mirror: half of the crops are mirrored (not where captions speak of left and right).
        weights: for each folder, its share of the samples, relative to the others'; by default each
            sample comes once an epoch. The realised shares are in the log (``data/share/...``).
        augmented: those of the folders whose training images are cropped and mirrored; all of them
            by default.
        global_batch_size: samples per optimizer step over all ranks.
        val_limit: at most so many validation samples (the first ones); 0 means all.
        workers: processes that decode images; 0 decodes in the training process.
        seed: of the order and of everything random about a sample.
    """

    def __init__(
        self,
        folders: list[str],
        train_split: str = "train",
        val_split: str = "val",
        crop_scale: float = 1.0,
        mirror: bool = False,
        weights: list[float] | None = None,
        augmented: list[str] | None = None,
        global_batch_size: int = 64,
        val_limit: int = 0,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < crop_scale <= 1:
            raise ValueError(f"crop_scale={crop_scale}: expected a share of the area in (0, 1]")
        self.folders, self.train_split, self.val_split = folders, train_split, val_split
        self.augmented = folders if augmented is None else augmented
        if unknown := set(self.augmented) - set(folders):
            raise ValueError(f"augmented has {sorted(unknown)}: expected some of data.folders")
        if weights is not None and len(weights) != len(folders):
            raise ValueError(
                f"{len(weights)} weights for {len(folders)} folders: expected one each"
            )
        self.weights = weights
        self.crop_scale, self.mirror = crop_scale, mirror
        self.global_batch_size, self.val_limit = global_batch_size, val_limit
        self.workers, self.seed = workers, seed

    def shards(self, split: str) -> list[Shards]:
        """Those of the folders, each as often as training names it, and once for any other use."""
        if not self.folders:
            raise ValueError("data.folders is empty: give at least one shard folder")
        named = [local_folder(folder) for folder in self.folders]
        once = split != self.train_split
        return [Shards(folder, split) for folder in (dict.fromkeys(named) if once else named)]

    def _loader(self, split: str, train: bool) -> GlobalBatchLoader:
        # How an image becomes a square is the model's business, in training as in use.
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        image_size, fit = module.preprocessing
        crops = train and self.crop_scale < 1
        shards = self.shards(split)
        check_codes(shards, module.expected_codes, crops)
        augmented = {local_folder(folder) for folder in self.augmented}
        dataset = ShardDataset(
            shards,
            image_size,
            fit,
            self.seed,
            self.crop_scale,
            self.mirror,
            [crops and one.folder in augmented for one in shards],
        )
        order = Order(
            [one.sizes for one in shards],
            self.seed,
            weights=self.weights if train else None,
            shuffle=train,
        )
        batches = GlobalBatches(
            order,
            self.global_batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            limit=0 if train else self.val_limit,
        )
        return GlobalBatchLoader(dataset, batches, self.workers)

    def train_dataloader(self) -> GlobalBatchLoader:
        return self._loader(self.train_split, train=True)

    def val_dataloader(self) -> GlobalBatchLoader:
        return self._loader(self.val_split, train=False)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> LoaderIterable:
        return LoaderIterable(self.val_dataloader())
