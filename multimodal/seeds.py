"""Random seeds that depend on names only, not on the order of work, the process or the machine."""

import hashlib


def stable_number(text: str) -> int:
    """Hash a text to a number in [0, 2**63). Python's ``hash`` differs between processes."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """A seed in [0, 2**63) for a sample in an epoch."""
    return stable_number(f"{seed}/{epoch}/{key}")


def rank_seed(seed: int, step: int, rank: int) -> int:
    """A seed in [0, 2**63) for what a rank draws from a step of a training on."""
    return stable_number(f"rank {rank}/{seed}/{step}")
