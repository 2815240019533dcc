"""CIDEr of many captions with many references at once, by sparse vectors.

The formula is that of pycocoevalcap, which is CIDEr-D without stemming (Vedantam et al. 2015,
arXiv:1411.5726): for each length of n-grams the cosine of TF-IDF vectors, with counts clipped to
those of the reference, times a Gaussian of the difference in length. A test compares the two. The
package scores one caption a picture. To search thirty thousand captions for the best constant one,
or to compare captions with each other, needs all pairs.

Clipping makes a sum of products of the smaller count min(a, b), which is no dot product. It becomes
one by a feature for each occurrence: the k-th "dog" of a caption is a feature of its own, and
min(a, b) is the number of occurrences that both have.

Shapes: C candidates, R references, F features.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

MAX_N = 4  # n-grams of one to four words
SIGMA = 6.0  # of the Gaussian of the difference in length
SCALE = 10.0

Gram = tuple[str, ...]


def n_grams(caption: str) -> Iterator[Gram]:
    """All n-grams of a tokenized caption, each as often as it occurs."""
    words = caption.split()
    for n in range(1, MAX_N + 1):
        for start in range(len(words) - n + 1):
            yield tuple(words[start : start + n])


@dataclass(frozen=True)
class CaptionVectors:
    """Vectors of captions, as candidates and as references.

    Args:
        occurs: float64[C, F], 1 for each occurrence that the caption has, over the caption's norm.
        weights: float64[C, F], count * idf^2 for each occurrence, over the caption's norm.
        lengths: int64[C].
    """

    occurs: sparse.csr_array
    weights: sparse.csr_array
    lengths: NDArray[np.int64]

    def __getitem__(self, rows: Sequence[int] | NDArray[np.int64]) -> "CaptionVectors":
        return CaptionVectors(self.occurs[rows], self.weights[rows], self.lengths[rows])


class CaptionSpace:
    """The n-grams of the references of pictures, and in how many pictures each occurs.

    Args:
        references: of each picture its captions, by ``ptb_tokenize``.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        pictures: Counter[Gram] = Counter()
        self.features: dict[tuple[Gram, int], int] = {}
        for captions in references:
            counts: Counter[Gram] = Counter()
            for caption in captions:
                counts |= Counter(n_grams(caption))
            pictures.update(counts.keys())
            for gram, count in counts.items():
                for occurrence in range(count):
                    self.features.setdefault((gram, occurrence), len(self.features))
        self.log_pictures = math.log(max(1, len(references)))
        self.idf = {gram: self.log_pictures - math.log(n) for gram, n in pictures.items()}

    def vectors(self, captions: Sequence[str]) -> CaptionVectors:
        """Vectors of C captions. An n-gram that no reference has counts in the norm only."""
        columns: list[int] = []
        occurs: list[float] = []
        weights: list[float] = []
        starts, lengths = [0], []
        for caption in captions:
            counts = Counter(n_grams(caption))
            squares = [0.0] * MAX_N
            for gram, count in counts.items():
                squares[len(gram) - 1] += (count * self.idf.get(gram, self.log_pictures)) ** 2
            norms = [math.sqrt(square) for square in squares]
            for gram, count in counts.items():
                norm = norms[len(gram) - 1]
                if gram not in self.idf or not norm:
                    continue
                for occurrence in range(count):
                    column = self.features.get((gram, occurrence))
                    if column is not None:
                        columns.append(column)
                        occurs.append(1 / norm)
                        weights.append(count * self.idf[gram] ** 2 / norm)
            starts.append(len(columns))
            # The length of pycocoevalcap is the number of bigrams.
            lengths.append(max(0, len(caption.split()) - 1))
        shape = (len(captions), len(self.features))
        return CaptionVectors(
            sparse.csr_array((occurs, columns, starts), shape),
            sparse.csr_array((weights, columns, starts), shape),
            np.array(lengths, np.int64),
        )


def _closeness(lengths: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64[C, R]: the Gaussian of the difference in length."""
    difference = lengths[:, None] - others[None]
    return np.exp(-(difference**2) / (2 * SIGMA**2))


def similarities(candidates: CaptionVectors, references: CaptionVectors) -> NDArray[np.float64]:
    """float64[C, R]: the CIDEr of each candidate with each single reference."""
    cosines = (candidates.occurs @ references.weights.T).toarray() / MAX_N
    return SCALE * cosines * _closeness(candidates.lengths, references.lengths)


def mean_similarities(
    candidates: CaptionVectors, references: CaptionVectors, shares: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The CIDEr of each candidate with all references together.

    References of the same length are added up first, so no matrix [C, R] is made.

    Args:
        shares: float64[R], the weight of each reference in the mean.

    Returns:
        float64[C], equal to ``similarities(candidates, references) @ shares``.
    """
    lengths, group = np.unique(references.lengths, return_inverse=True)
    # [lengths, R] @ [R, F]
    sums = sparse.csr_array((shares, (group, np.arange(len(group)))), (len(lengths), len(group)))
    cosines = (candidates.occurs @ (sums @ references.weights).T).toarray() / MAX_N
    return SCALE * (cosines * _closeness(candidates.lengths, lengths)).sum(1)
