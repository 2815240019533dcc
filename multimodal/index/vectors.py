"""Approximate nearest neighbours by their cosine: a graph of usearch (the extra ``index``).

The graph is HNSW (Malkov & Yashunin 2016, arXiv:1603.09320). A file is mapped into memory, so
opening one of any size takes no time, and processes share what they read. Rows are float32.

Shapes: N rows, D width of an embedding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CONNECTIVITY = 16  # neighbours of a node (M of the paper); twice as many on the lowest layer
EXPANSION_ADD = 128  # candidates when a row is added (efConstruction)
EXPANSION_SEARCH = 256  # candidates when one is searched (ef): benchmarks/index.py has the recall
FEW = 4096  # rows that are compared one by one: a graph may have no way to one of them
Rows = NDArray[np.float32]


class Vectors:
    """Rows of unit norm, each under a number.

    Args:
        width: D.
        path: a file that ``save`` wrote. None: no rows yet.
        writable: read the file into memory. Otherwise it is mapped, and nothing can be added.

    Raises:
        ValueError: if usearch is missing, or if the file is not of this width.
    """

    def __init__(self, width: int, path: Path | None = None, *, writable: bool = True) -> None:
        usearch = _usearch()
        self.width, self.writable = width, writable
        self._graph = usearch.Index(
            ndim=width,
            metric="cos",
            dtype="f32",
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=EXPANSION_SEARCH,
        )
        if path is None:
            return
        try:
            about = usearch.Index.metadata(path) or {}
            kinds = (about.get("kind_scalar"), about.get("kind_metric"), about.get("dimensions"))
            if kinds != (usearch.ScalarKind.F32, usearch.MetricKind.Cos, width):
                raise ValueError(f"not float32 rows of {width}")
            self._graph.load(path) if writable else self._graph.view(path)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise ValueError(f"{path}: not an index of usearch ({error})") from error
        # The file has no settings of the search.
        self._graph.expansion_add, self._graph.expansion_search = EXPANSION_ADD, EXPANSION_SEARCH

    def __len__(self) -> int:
        return len(self._graph)

    def __contains__(self, number: int) -> bool:
        return number in self._graph

    def add(self, numbers: Sequence[int], rows: Rows) -> None:
        """numbers: N that are not there yet. rows: float32[N, D]."""
        self._check_writable()
        self._graph.add(np.array(numbers, np.uint64), rows, threads=1)

    def remove(self, numbers: Sequence[int]) -> None:
        self._check_writable()
        if numbers:
            self._graph.remove(np.array(numbers, np.uint64), threads=1)

    def search(self, rows: Rows, k: int) -> list[list[tuple[int, float]]]:
        """The k nearest of each row, the best first: (number, cosine). rows: float32[N, D].

        Up to FEW rows in the index, they are exactly those.
        """
        k = min(k, len(self))
        if not k:
            return [[] for _ in rows]
        few = len(self) <= FEW
        found = [self._graph.search(row, k, threads=1, exact=few) for row in rows]
        return [
            [(int(n), 1 - float(d)) for n, d in zip(each.keys, each.distances, strict=True)]
            for each in found
        ]

    def cosines(self, row: Rows, numbers: Sequence[int]) -> list[float]:
        """Those of a row with rows of the index. row: float32[D] of unit norm."""
        if not numbers:
            return []
        rows: Rows = self._graph.get(np.array(numbers, np.uint64))
        return (rows @ row).tolist()

    def save(self, path: Path) -> None:
        """Raises ``OSError`` if the file cannot be written."""
        try:
            self._graph.save(path)
        except (RuntimeError, ValueError) as error:
            raise OSError(f"{path}: could not be written ({error})") from error

    def _check_writable(self) -> None:
        if not self.writable:  # usearch would write to the file's pages, and crash
            raise ValueError("rows that are mapped from a file can only be searched")


def as_rows(rows: Tensor) -> Rows:
    return np.ascontiguousarray(rows.numpy(), np.float32)


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as error:
        raise ValueError(f"an index needs: pip install multimodal[index] ({error})") from error
    return usearch.index
