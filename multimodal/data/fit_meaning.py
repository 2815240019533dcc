"""The codebooks of the level of meaning, from the images of shard folders.

Features of some positions of each image are kept, shard by shard: a run that was stopped goes on
with the shards that are missing. Then they are clustered. The same input gives the same codebooks.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal.data.documents import images_in
from multimodal.data.images import fit_image, open_image, to_tensor
from multimodal.data.jobs import job_folder
from multimodal.data.parallel import map_ordered
from multimodal.data.samples import Sample
from multimodal.data.shards import Shards, read_manifest
from multimodal.files import atomic_file, atomic_folder, local_path, write_json
from multimodal.seeds import sample_seed
from multimodal.tokenizers.meaning import COLOUR_CHANNELS, Fitted, Meaning, fit_codebooks

SETTINGS = "fitting.json"  # the arguments, in a folder that is not finished
FEATURES = ".features"
REPORT = "report.json"


@dataclass(frozen=True)
class FitOptions:
    """How codebooks are fitted.

    Args:
        images: at most so many of each folder, spread evenly over its shards. 0: all.
        positions: at most so many of all images together are clustered.
        rounds: of k-means.
        standardise: give all channels the same variance first.
        seed: of the positions and of k-means.
        split: the split that is read.
        batch_size: images encoded at once.
        decoders: threads that open images.
    """

    images: int = 0
    positions: int = 400_000
    rounds: int = 25
    standardise: bool = False
    seed: int = 0
    split: str = "train"
    batch_size: int = 32
    decoders: int = 2


def fit_meaning(
    folders: Sequence[str | Path],
    out: str | Path,
    meaning: Meaning,
    options: FitOptions = FitOptions(),  # noqa: B008 (frozen)
    on_image: Callable[[int], object] = lambda count: None,
    on_round: Callable[[int, float], object] = lambda group, lost: None,
    on_skipped: Callable[[str], object] = lambda message: None,
) -> Fitted:
    """Fit codebooks and write the tokenizer folder.

    An image that cannot be read is left out and named. A folder that is named twice counts once.

    Args:
        folders: shard folders with images.
        out: a folder that does not exist, is empty, or is left from an earlier call with the same
            arguments.
        meaning: an encoder with empty codebooks, which are filled.
        on_image, on_round: show progress.
        on_skipped: is given what was wrong with an image that is left out.

    Raises:
        ValueError: if ``out`` holds anything else, or there are fewer positions than codes.
    """
    out = local_path(out)
    shards = [Shards(folder, options.split) for folder in dict.fromkeys(map(Path, folders))]
    counts = [_images_of(source, options) for source in shards]
    parts = [
        (Shards(source.folder, only=str(entry["name"])), count / max(1, len(source)))
        for source, count in zip(shards, counts, strict=True)
        for entry in read_manifest(source.folder)["shards"]
        if entry["split"] == options.split
    ]
    settings = {
        "shards": [source.fingerprint for source in shards],
        "weights": meaning.fingerprint,
        **asdict(meaning.config),
        **asdict(options),
    }
    with job_folder(out, out / SETTINGS, settings):
        (out / FEATURES).mkdir(exist_ok=True)
        each = max(1, options.positions // max(1, sum(counts)))
        files = []
        for number, (source, share) in enumerate(parts):
            file = out / FEATURES / f"{number:05d}.safetensors"
            if not file.is_file():
                features = _features(source, share, each, meaning, options, on_image, on_skipped)
                with atomic_file(file) as part:
                    save_file({"features": features}, part)
            else:
                on_image(round(share * len(source)))
            files.append(file)
        features = torch.cat([load_file(file)["features"] for file in files]).float()
        if len(features) > options.positions:
            generator = torch.Generator().manual_seed(options.seed)
            features = features[torch.randperm(len(features), generator=generator)]
            features = features[: options.positions]
        fitted = fit_codebooks(
            meaning, features, options.seed, options.rounds, options.standardise, on_round
        )
        with atomic_folder(out) as part:
            meaning.save(part)
            write_json(part / REPORT, report_of(fitted, len(features)))
        shutil.rmtree(out / FEATURES)
        (out / SETTINGS).unlink()
    return fitted


def report_of(fitted: Fitted, positions: int) -> dict[str, object]:
    """What fitting found out, for JSON."""
    return {
        "positions": positions,
        "variance_explained": fitted.explained,
        "groups": [
            {"variance_lost": lost, "used": clusters.used, "perplexity": clusters.perplexity}
            for lost, clusters in zip(fitted.lost, fitted.clusters, strict=True)
        ],
    }


def _images_of(source: Shards, options: FitOptions) -> int:
    return min(len(source), options.images) if options.images else len(source)


def _features(
    source: Shards,
    share: float,
    each: int,
    meaning: Meaning,
    options: FitOptions,
    on_image: Callable[[int], object],
    on_skipped: Callable[[str], object],
) -> Tensor:
    """Features of some positions of a share of the images of a shard: float16[N, D]."""
    count = max(1, round(share * len(source)))
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    config = meaning.config

    def pixels(number: int) -> tuple[Sample, list[Tensor]]:
        sample, found = source[number], list[Tensor]()
        try:
            for data in images_in(sample):
                image = open_image(data, name=sample.key)
                found.append(to_tensor(fit_image(image, config.image_size, config.fit)))
        except ValueError as error:
            on_skipped(f"{source.folder}: {error}")
        return sample, found

    kept: list[Tensor] = []
    batch: list[Tensor] = []
    keys: list[str] = []
    for position, (sample, images) in enumerate(
        map_ordered(pixels, chosen.tolist(), options.decoders)
    ):
        batch += images
        keys += [f"{number}/{sample.key}" for number in range(len(images))]
        on_image(1)
        if batch and (len(batch) >= options.batch_size or position == count - 1):
            features = meaning.features(torch.stack(batch)).flatten(1, 2).half()
            for key, grid in zip(keys, features, strict=True):
                rng = np.random.default_rng(sample_seed(options.seed, 0, key))
                kept.append(grid[rng.permutation(len(grid))[:each].tolist()])
            batch, keys = [], []
    if not kept:
        width = len(meaning.center) + COLOUR_CHANNELS * config.colours
        return torch.zeros(0, width, dtype=torch.float16)
    return torch.cat(kept)
