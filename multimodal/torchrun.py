"""What torchrun tells the processes that it starts. Torch-free."""

import os


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks. (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    return rank_and_world_size()[0] == 0
