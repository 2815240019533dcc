"""Jobs over shards write one result per shard, so that a job that was stopped can go on.

The folder of a job holds the arguments of its first start. Other arguments cannot continue it.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multimodal.data.parallel import POLL_INTERVAL, exclusive_lock
from multimodal.files import local_path, read_json, temporary_path, write_json
from multimodal.torchrun import is_first_rank

LOCK = ".lock"


@contextmanager
def job_folder(
    out: Path, settings: Path, arguments: dict[str, Any], result: Path | None = None
) -> Iterator[bool]:
    """Create the folder of a job, or check that it was created with the same arguments.

    Under torchrun the first rank does this. The other ranks wait until it is done, or until the
    job is finished.

    Args:
        out: the folder.
        settings: a file in it that holds the arguments. The job can go on while this file exists.
        arguments: what the job was started with. It has to fit in JSON.
        result: a file that exists when the job is finished.

    Yields:
        Whether this process is the first rank, which finishes the job.

    Raises:
        ValueError: if the folder holds anything else, or if another process works in it.
    """
    out = local_path(out)
    arguments = json.loads(json.dumps(arguments))  # as a reader sees them
    if not is_first_rank():
        while not ((result and result.is_file()) or _has_started(settings, arguments)):
            time.sleep(POLL_INTERVAL)
        yield False
        return
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(out, LOCK):
        if settings.is_file():
            if _read(settings) != arguments:
                raise ValueError(
                    f"{out}: was begun with other shards or options; give a new folder"
                )
        else:
            temporary = temporary_path(settings).name  # left by a job that was killed at its start
            if {path.name for path in out.iterdir()} - {LOCK, temporary}:
                raise ValueError(f"{out}: not empty; give a new folder")
            write_json(settings, arguments)
        yield True


def _has_started(settings: Path, arguments: dict[str, Any]) -> bool:
    try:
        return _read(settings) == arguments
    except (OSError, ValueError):
        return False


def _read(settings: Path) -> Any:
    return read_json(settings)
