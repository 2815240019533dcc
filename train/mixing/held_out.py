"""A part of the training samples that is held out, for folders without a split of their own."""

from dataclasses import dataclass

from multimodal.data.shards import Shards
from multimodal.seeds import stable_number

AT_MOST = 1000  # samples of a folder: more make a validation longer, and no more certain


@dataclass(frozen=True)
class HeldOut:
    """Whether a sample is held out, by its key alone: ``held_out(key)``.

    The same samples are held out in every run, in whatever order and shards they are stored.

    Args:
        below: a sample is held out if the hash of its key is below.
        rest: True for the samples that are left to train on.
    """

    below: int
    rest: bool = False

    def __call__(self, key: str) -> bool:
        return (stable_number(key) < self.below) != self.rest


def hash_below(shards: Shards, share: float) -> int:
    """The hash below which a share of the samples is.

    Args:
        shards: all samples of which some are to be held out.
        share: of the samples, in (0, 1). At least one sample and at most AT_MOST are held out, and
            never all: none of one sample.
    """
    hashes = sorted(stable_number(shards.key(number)) for number in range(len(shards)))
    count = min(max(1, round(share * len(hashes))), AT_MOST, len(hashes) - 1)
    return hashes[count] if count > 0 else 0
