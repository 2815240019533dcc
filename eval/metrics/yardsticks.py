"""Captions that need no captioner: what a model must beat for its score to mean something.

The lookup is the nearest-neighbour captioner of Devlin et al. 2015 (arXiv:1505.04467): of the
captions of the nearest training pictures, the one that agrees most with the others.

All captions are tokenized by ``ptb_tokenize``.

Shapes: M training pictures, N pictures, D dimensions of features.
"""

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from multimodal.eval.metrics.cider import CaptionSpace, mean_similarities, similarities

NEIGHBOURS = 25
T = TypeVar("T")


def best_constant(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    """The candidate with the highest CIDEr as the caption of every picture.

    Args:
        candidates: captions, at least one.
        references: of each picture its captions.
    """
    space = CaptionSpace(references)
    unique = list(dict.fromkeys(candidates))
    shares = [1 / (len(references) * len(captions)) for captions in references for _ in captions]
    scores = mean_similarities(
        space.vectors(unique),
        space.vectors([caption for captions in references for caption in captions]),
        np.array(shares),
    )
    return unique[int(scores.argmax())]


class Lookup:
    """Captions pictures by the captions of similar training pictures.

    Args:
        features: float[M, D], of the training pictures.
        captions: of each training picture, at least one.
        neighbours: how many training pictures are asked, at most M.
    """

    def __init__(
        self,
        features: NDArray[np.floating[Any]],
        captions: Sequence[Sequence[str]],
        neighbours: int = NEIGHBOURS,
    ) -> None:
        assert len(features) == len(captions), f"{len(features)} features of {len(captions)}"
        self.features, self.neighbours = _unit(features), neighbours
        self.captions = [caption for each in captions for caption in each]
        self.vectors = CaptionSpace(captions).vectors(self.captions)
        ends = np.cumsum([len(each) for each in captions])
        self.rows = [
            np.arange(end - len(each), end) for end, each in zip(ends, captions, strict=True)
        ]

    def nearest(self, features: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """float[N, D] -> int64[N, neighbours]: rows with the highest cosine, the nearest first."""
        cosines = _unit(features) @ self.features.T
        return np.argsort(-cosines, axis=1, kind="stable")[:, : self.neighbours]

    def __call__(self, features: NDArray[np.floating[Any]]) -> list[str]:
        """float[N, D] -> N captions: of all captions of the nearest pictures the one with the
        highest mean CIDEr to the others.
        """
        result = []
        for nearest in self.nearest(features):
            rows = np.concatenate([self.rows[picture] for picture in nearest])
            vectors = self.vectors[rows]
            agreement = similarities(vectors, vectors)
            np.fill_diagonal(agreement, 0)
            result.append(self.captions[rows[agreement.sum(1).argmax()]])
        return result


def _unit(rows: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """Each item in another's place. With two or more items, none stays in its own."""
    order = random.Random(f"shuffled/{seed}").sample(range(len(items)), len(items))
    result = list(items)
    for place, source in zip(order, order[1:] + order[:1], strict=True):
        result[place] = items[source]
    return result
