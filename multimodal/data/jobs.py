"""Jobs over shards: a result for each, whole or not there, so that a job that was stopped goes on.

What a job was begun with is in its folder: other arguments are no continuation.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multimodal.data.parallel import POLL_INTERVAL, exclusive_lock, rank_and_world_size
from multimodal.files import temporary_path, write_json

LOCK = ".lock"


@contextmanager
def job_folder(
    out: Path, settings: Path, begun_with: dict[str, Any], result: Path | None = None
) -> Iterator[bool]:
    """Make the folder, or see that what is in it was begun with the same arguments.

    settings: the file in it that says so; as long as it is there, the job can go on. Under torchrun
    the first rank does this, and the others wait for it, or for the ``result`` that ends the job.
    Yields whether this process is the first rank, which ends the job.
    Errors: ``ValueError`` for a folder of something else, or where another process is at work.
    """
    begun_with = json.loads(json.dumps(begun_with))  # as it will be read
    if rank_and_world_size()[0]:
        while not ((result and result.is_file()) or _begun(settings, begun_with)):
            time.sleep(POLL_INTERVAL)
        yield False
        return
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out, LOCK):
        if settings.is_file():
            if _read(settings) != begun_with:
                raise ValueError(
                    f"{out}: was begun with other shards or options; give a new folder"
                )
        else:
            temporary = temporary_path(settings).name  # of a job that was killed at its start
            if {one.name for one in out.iterdir()} - {LOCK, temporary}:
                raise ValueError(f"{out}: not empty; give a new folder")
            write_json(settings, begun_with)
        yield True


def _begun(settings: Path, begun_with: dict[str, Any]) -> bool:
    try:
        return bool(_read(settings) == begun_with)
    except (OSError, ValueError):
        return False


def _read(settings: Path) -> Any:
    try:
        return json.loads(settings.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{settings}: not readable as JSON ({error})") from error
