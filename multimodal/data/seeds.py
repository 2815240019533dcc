"""Random numbers that depend on names alone: on no order of work, no process, no machine."""

import hashlib


def stable_number(text: str) -> int:
    """A number in [0, 2**63) from the text alone; Python's own hash differs between processes."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """A number in [0, 2**63) that depends on nothing else."""
    return stable_number(f"{seed}/{epoch}/{key}")
