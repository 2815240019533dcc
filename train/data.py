"""Shard folders as Lightning dataloaders, which a checkpoint can resume at the exact sample.

The order of the samples is a function of (seed, epoch). It is the same on any number of ranks. So
``__len__`` is known, and the state of the loader is two numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from multimodal.data.parallel import MAX_WORKERS, end_with_main, worker_context
from multimodal.data.remote.ahead import AHEAD
from multimodal.data.remote.folder import local_folder
from multimodal.data.samples import readable
from multimodal.data.shards import Shards, read_manifest
from multimodal.seeds import stable_number
from multimodal.terminal import print_status
from multimodal.train.examples import ShardDataset, check_codes
from multimodal.train.mixing.few_shot import FewShot
from multimodal.train.mixing.held_out import HeldOut, hash_below
from multimodal.train.mixing.replay import SCENES, scenes_folder, with_replay
from multimodal.train.sample_order import VERSION, GlobalBatches, Order

VAL = "val"  # a folder need not have this split
LICENSES_OF = 256  # samples of a folder whose licences a card names


class GlobalBatchLoader(DataLoader[Any]):
    """A DataLoader whose state is (epoch, batches done), the same on every rank.

    The state also holds everything that decides the order of the samples. A state with another
    order is refused.
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
            worker_init_fn=end_with_main,
            persistent_workers=False,
            # An iterator draws a seed. A resumed run makes one more, which must not change the
            # random numbers of the training (dropout).
            generator=torch.Generator(),
        )
        self._done = (0, 0)
        if any(source.is_remote for source in dataset.sources):
            batches.announce = dataset.announce
            batches.ahead = max(2, AHEAD * batches.world_size // batches.global_batch_size)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator over torch's
        epoch, first = self.batch_sampler.epoch, self.batch_sampler.skipped
        for number, batch in enumerate(super().__iter__(), start=first + 1):
            self._done = (epoch, number)
            yield batch

    def _order_key(self) -> dict[str, Any]:
        """Everything that decides the order of the samples."""
        batches = self.batch_sampler
        weights = batches.order.weights
        return {
            "version": VERSION,
            "seed": batches.order.seed,
            "global_batch_size": batches.global_batch_size,
            "samples": len(batches.order),
            "weights": None if weights is None else [float(weight) for weight in weights],
            "shards": stable_number("".join(source.fingerprint for source in self.dataset.sources)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._done[0], "batches": self._done[1], "order_of": self._order_key()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of a checkpoint.

        Raises:
            ValueError: if the checkpoint was written with another order of the samples.
        """
        before, now = state.get("order_of", {}), self._order_key()
        changed = [name for name in now if before.get(name) != now[name]]
        if changed and self.batch_sampler.order.shuffle:
            changes = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)
            raise ValueError(
                f"the data are not those of the checkpoint ({changes}), so the samples that were "
                "seen are unknown: resume with the same data and seed, or start from the weights "
                "alone with --init_from"
            )
        self.batch_sampler.start = self._done = (state["epoch"], state["batches"])


class LoaderIterable:
    """Hides that a loader is a DataLoader. For predict, Lightning rebuilds every DataLoader with
    its own arguments, and fails on ours."""

    def __init__(self, loader: GlobalBatchLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class ShardData(L.LightningDataModule):
    """Shard folders for ``fit``, ``validate``, ``test`` and ``predict``.

    The LightningModule must have two properties. ``preprocessing`` is (image size, fit).
    ``expected_codes`` is the fingerprint of the codes that it reads, or None if it needs pixels.

    Args:
        folders: shard folders with a manifest, or their addresses (s3://...). The samples of all
            folders are mixed. A folder that is named twice is seen twice in each epoch, with other
            crops and captions.
        train_split: name of the training split, as in ``train-0000.tar``.
        val_split: name of the validation split.
        hold_out: if no folder has a split val, the share of the training samples that is held out
            and validated on: by their keys, so the same ones in every run. 0: none.
        crop_scale: the smallest share of the image that a random training crop covers. 1: no crops.
        mirror: mirror half of the crops. Leave it out if captions say left and right.
        weights: for each folder, its share of the samples, relative to the others. By default each
            sample comes once an epoch. The actual shares are logged (``data/share/...``).
        replay: the share of the training samples that are of what the model was trained on before,
            so that it is not forgotten. An epoch has that many more samples.
        replayed: the shard folders that these come from. ``scenes`` is rendered, not read. They
            are not validated on.
        few_shot: the share of the training samples that end a document of examples (share), at
            most how many (examples), and in how many documents only these show how a text is
            written (restyled).
        augmented: the folders whose training images are cropped and mirrored. By default all that
            are not replayed.
        drawn: the folders whose images are learned to be drawn. By default all. The others are read
            only. Documents are always learned as a whole.
        global_batch_size: samples per optimizer step, over all ranks.
        val_limit: use the first ``val_limit`` validation samples. 0 uses all.
        workers: processes that decode images. 0 decodes in the training process.
        seed: of the order, and of all random choices about a sample. By default 0, and in a run
            that of ``--seed_everything``.

    Raises:
        ValueError: for a share that is none, a folder in augmented or drawn that is not in folders,
            or a wrong number of weights.
    """

    def __init__(
        self,
        folders: list[str],
        train_split: str = "train",
        val_split: str = VAL,
        hold_out: float = 0.1,
        crop_scale: float = 1.0,
        mirror: bool = False,
        weights: list[float] | None = None,
        replay: float = 0.0,
        replayed: list[str] = [SCENES],  # noqa: B006 (it is copied)
        few_shot: FewShot = FewShot(),  # noqa: B008 (frozen)
        augmented: list[str] | None = None,
        drawn: list[str] | None = None,
        global_batch_size: int = 64,
        val_limit: int = 0,
        workers: int = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < crop_scale <= 1:
            raise ValueError(f"crop_scale={crop_scale}: expected a share of the area in (0, 1]")
        for name, share in (("hold_out", hold_out), ("replay", replay)):
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share}: expected a share of the samples in [0, 1)")
        if replay and not replayed:
            raise ValueError(f"replay={replay}: replayed names no folder to replay")
        self.train_split, self.val_split, self.hold_out = train_split, val_split, hold_out
        self.replay, self.new, self.old = replay, folders, replayed if replay else []
        self.folders = [*self.new, *self.old]
        self.few_shot = few_shot
        self.augmented = folders if augmented is None else augmented
        self.drawn = self.folders if drawn is None else drawn
        for name in ("augmented", "drawn"):
            if unknown := set(getattr(self, name)) - set(self.folders):
                raise ValueError(f"{name} has {sorted(unknown)}: expected some of data.folders")
        if weights is not None and len(weights) != len(folders):
            raise ValueError(
                f"{len(weights)} weights for {len(folders)} folders: expected one each"
            )
        self.weights = weights
        self.crop_scale, self.mirror = crop_scale, mirror
        self.global_batch_size, self.val_limit = global_batch_size, val_limit
        if not 0 <= workers <= MAX_WORKERS:
            raise ValueError(f"workers={workers}: expected 0 to {MAX_WORKERS:,}")
        self.workers, self.seed = workers, seed or 0
        self._sources: list[dict[str, Any]] | None = None
        self._hash_below: dict[Path, int] = {}

    @property
    def drawn_folders(self) -> set[Path]:
        """The folders whose images are learned to be drawn, on this machine."""
        return {self._local(folder) for folder in self.drawn}

    def _local(self, folder: str) -> Path:
        """The folder on this machine. What is replayed is rendered where it has to be."""
        if folder != SCENES or folder in self.new:
            return local_folder(folder)
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        return scenes_folder(module.preprocessing[0])

    def prepare_data(self) -> None:
        """Lightning calls it in one process of a machine, before the others go on.

        Raises:
            ValueError: if scenes, which are images, would be replayed beside codes.
        """
        if SCENES in self.old and SCENES not in self.new:
            for new in map(local_folder, self.new):
                if "image_tokenizer" in read_manifest(new):
                    raise ValueError(
                        f"data.replay={self.replay}: scenes are rendered as images, and {new} "
                        "holds codes: make a folder of scenes (multimodal data scenes), encode it "
                        "(multimodal tokenizer encode), and name it in data.replayed"
                    )
        for folder in self.old:
            self._local(folder)

    def shards(self, split: str) -> list[Shards]:
        """The shards of a split. A folder that is named twice counts twice in training only."""
        if not self.folders:
            raise ValueError("data.folders is empty: give at least one shard folder")
        folders = [local_folder(folder) for folder in self.new]
        divided = bool(self.hold_out) and not self.has_val_split()
        if split == self.train_split:
            new = [self._part(f, rest=True) if divided else Shards(f, split) for f in folders]
            return new + [Shards(self._local(folder), split) for folder in self.old]
        folders = list(dict.fromkeys(folders))
        if split == self.val_split == VAL:
            if divided:
                return [self._part(folder, rest=False) for folder in folders]
            folders = [folder for folder in folders if VAL in splits(folder)] or folders
        return [Shards(folder, split) for folder in folders]

    def _part(self, folder: Path, rest: bool) -> Shards:
        """The training samples of a folder that are held out, or the rest of them."""
        if folder not in self._hash_below:
            everything = Shards(folder, self.train_split)
            self._hash_below[folder] = hash_below(everything, self.hold_out)
        part = HeldOut(self._hash_below[folder], rest)
        return Shards(folder, self.train_split, keep=part)

    def sources(self) -> list[dict[str, Any]]:
        """What a card says of the data: name, samples, and licences of the first samples."""
        if self._sources is None:
            self._sources = []
            for folder, shards in zip(self.folders, self.shards(self.train_split), strict=True):
                made = read_manifest(shards.folder)
                first = (shards[n] for n in range(min(len(shards), LICENSES_OF)))
                records = (each.record for each in readable(first, lambda problem: None))
                named = {str(each["license"]) for each in (made, *records) if each.get("license")}
                self._sources.append(
                    {
                        "kind": "data",
                        "name": Path(folder.rstrip("/")).name,
                        "samples": len(shards),
                        "license": ", ".join(sorted(named)),
                    }
                )
        return self._sources

    def _loader(self, split: str, train: bool, replaced: bool = True) -> GlobalBatchLoader:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        image_size, fit = module.preprocessing
        crops = train and self.crop_scale < 1
        shards = self.shards(split)
        check_codes(shards, module.expected_codes, crops)
        few_shot = self.few_shot if train and self.few_shot.share else None
        if few_shot is not None:
            few_shot.check(getattr(module, "builder", None))
        augmented = {self._local(folder) for folder in self.augmented}
        drawn = self.drawn_folders
        dataset = ShardDataset(
            shards,
            image_size,
            fit,
            self.seed,
            self.crop_scale,
            self.mirror,
            [crops and source.folder in augmented for source in shards],
            [source.folder in drawn for source in shards],
            getattr(module, "check_sample", None),
            replaced,
            few_shot,
        )
        weights, length = self._weights(shards) if train else (None, None)
        sizes = [source.sizes for source in shards]
        order = Order(sizes, self.seed, weights, shuffle=train, length=length)
        batches = GlobalBatches(
            order,
            self.global_batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            limit=0 if train else self.val_limit,
            same_epoch=bool(self.trainer.overfit_batches),  # type: ignore[attr-defined]
        )
        return GlobalBatchLoader(dataset, batches, self.workers)

    def _weights(self, shards: list[Shards]) -> tuple[list[float] | None, int | None]:
        """The weights of all folders, and how many samples an epoch has."""
        if not self.replay:
            return self.weights, None
        counts = list(map(len, shards))
        new, replayed = counts[: len(self.new)], counts[len(self.new) :]
        weights = with_replay(self.weights or new, replayed, self.replay)
        return weights, round(sum(new) / (1 - self.replay))

    def train_dataloader(self) -> GlobalBatchLoader:
        return self._loader(self.train_split, train=True)

    def val_dataloader(self) -> GlobalBatchLoader | list[Any]:
        if self.has_val_split() or self.trainer is None or self.trainer.state.fn != "fit":
            return self._loader(self.val_split, train=False)
        held_out = sum(map(len, self.shards(VAL))) if self.hold_out else 0
        if self.trainer.is_global_zero:
            print_status(
                f"no folder has a split {VAL}: "
                + (
                    f"{held_out:,} training samples are held out by their keys, and validated on "
                    f"(data.hold_out: {self.hold_out})"
                    if held_out
                    else "nothing is held out, so nothing is validated, and the model is that of "
                    "the last step"
                )
            )
        return self._loader(VAL, train=False) if held_out else []

    def test_dataloader(self) -> GlobalBatchLoader:
        return self._loader(self.val_split, train=False)

    def predict_dataloader(self) -> LoaderIterable:
        return LoaderIterable(self._loader(self.val_split, train=False, replaced=False))

    def has_val_split(self) -> bool:
        """Whether a folder has the validation split, or has to: another name was asked for."""
        if self.val_split != VAL:
            return True
        return any(VAL in splits(local_folder(folder)) for folder in self.new)


def splits(folder: Path) -> set[str]:
    """The splits of a shard folder, by its manifest."""
    return {str(shard["split"]) for shard in read_manifest(folder)["shards"]}
