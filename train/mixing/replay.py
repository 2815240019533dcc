"""Replay: some of what a model was trained on before, so that it is not forgotten.

A share of the samples of each epoch comes from other folders (rehearsal; Robins 1995, "Catastrophic
forgetting, rehearsal and pseudorehearsal"). Synthetic scenes need no folder: they are rendered.
"""

from collections.abc import Sequence
from pathlib import Path

from multimodal.data.remote.folder import cache_folder
from multimodal.files import new_folder
from multimodal.scenes.dataset import write_scenes
from multimodal.terminal import print_status

SCENES = "scenes"  # in the place of a folder
COUNT = 2000  # scenes that are rendered
SEED = 0


def scenes_folder(image_size: int) -> Path:
    """A shard folder of scenes in the cache. It is rendered if it is not there.

    Args:
        image_size: pixels of a side.
    """
    folder = cache_folder() / "scenes" / f"{COUNT}-of-seed-{SEED}-{image_size}px"
    if not (folder / "manifest.json").is_file():
        print_status(f"{folder}: renders {COUNT:,} scenes to replay")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new_folder(folder) as part:
                write_scenes(part, COUNT, SEED, image_size)
        except (OSError, ValueError):
            if not (folder / "manifest.json").is_file():  # else another process was faster
                raise
    return folder


def with_replay(weights: Sequence[float], replayed: Sequence[int], share: float) -> list[float]:
    """The weights of all folders if some are replayed: of the new ones, then of those.

    Args:
        weights: of the folders that are new.
        replayed: the number of samples of each folder that is replayed.
        share: of all samples that are replayed, in (0, 1).
    """
    new = [(1 - share) * weight / sum(weights) for weight in weights]
    old = [share * count / sum(replayed) for count in replayed]
    return [*new, *old]
