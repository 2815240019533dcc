"""Partial images: what a stream shows of an image while it is drawn."""

from collections.abc import Callable, Generator
from typing import TypeVar

Made = TypeVar("Made")
Shown = TypeVar("Shown")


def is_due(shown: int, wanted: int, share: float) -> bool:
    """Whether the next partial image is shown now. share: of the drawing, in [0, 1]."""
    return shown < wanted and (shown + 1) / (wanted + 1) <= share < 1


def with_partial_images(
    steps: Generator[Callable[[], Shown] | None, None, Made], wanted: int, total: int
) -> Generator[Shown | None, None, Made]:
    """Steps of masked drawing that yield partial images. Others are not computed.

    Args:
        steps: yield what computes one.
        total: how many steps have one.
    """
    number = shown = 0
    while True:
        try:
            partial_image = next(steps)
        except StopIteration as end:
            return end.value
        number += partial_image is not None
        if partial_image is not None and is_due(shown, wanted, number / total):
            shown += 1
            yield partial_image()
        else:
            yield None
