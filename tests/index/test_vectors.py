"""The graph finds what all products find, through changes, and a mapped file is only read."""

from pathlib import Path

import numpy as np
import pytest

from multimodal.index.vectors import Rows, Vectors

WIDTH = 24


def unit(count: int, seed: int = 0) -> Rows:
    """Rows of unit norm in twenty clusters."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(20, WIDTH))
    rows = centres[rng.integers(20, size=count)] + 0.3 * rng.normal(size=(count, WIDTH))
    result: Rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return result


def recall(vectors: Vectors, rows: dict[int, Rows], k: int = 10) -> float:
    """The share of the nearest by all products that the graph finds, with the right scores."""
    numbers, queries = np.array(sorted(rows)), unit(50, seed=9)
    products = queries @ np.stack([rows[n] for n in numbers]).T
    shares = []
    for found, scores in zip(vectors.search(queries, k), products, strict=True):
        of = dict(zip(numbers.tolist(), scores, strict=True))
        assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
        assert np.allclose([score for _, score in found], [of[n] for n, _ in found], atol=1e-5)
        exact = numbers[np.argsort(-scores)[:k]]
        shares.append(len({n for n, _ in found} & set(exact.tolist())) / len(exact))
    return float(np.mean(shares))


def test_recall_against_all_products_before_and_after_changes(tmp_path: Path) -> None:
    first = unit(1500)
    rows = dict(enumerate(first))
    vectors = Vectors(WIDTH)
    vectors.add(range(1500), first)
    assert recall(vectors, rows) > 0.99
    rng = np.random.default_rng(1)
    for turn in range(4):  # three quarters of the numbers are removed, half of those used again
        gone = rng.permutation(sorted(rows))[: len(rows) * 3 // 4].tolist()
        vectors.remove(gone)
        for number in gone:
            del rows[number]
        again = sorted(gone)[: len(gone) // 2]
        new = unit(len(again), seed=20 + turn)
        vectors.add(again, new)
        rows |= dict(zip(again, new, strict=True))
        assert len(vectors) == len(rows)
    assert recall(vectors, rows) > 0.99
    vectors.save(tmp_path / "rows")
    for writable in (True, False):
        stored = Vectors(WIDTH, tmp_path / "rows", writable=writable)
        assert stored.search(unit(5, 3), 7) == vectors.search(unit(5, 3), 7)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_rows_and_none(tmp_path: Path, count: int) -> None:
    vectors = Vectors(WIDTH)
    vectors.add(range(count), unit(count))
    vectors.save(tmp_path / "rows")
    for each in (vectors, Vectors(WIDTH, tmp_path / "rows", writable=False)):
        found = each.search(unit(2), 10)
        assert [len(row) for row in found] == [count, count] and len(each) == count
        assert all(number in each for number in range(count)) and count not in each


def test_equal_rows_are_all_found() -> None:
    vectors = Vectors(WIDTH)
    vectors.add(range(40), np.repeat(unit(1), 40, 0))
    (found,) = vectors.search(unit(1), 40)
    assert sorted(number for number, _ in found) == list(range(40))
    assert all(score == pytest.approx(1) for _, score in found)


def test_a_mapped_file_is_only_read(tmp_path: Path) -> None:
    vectors = Vectors(WIDTH)
    vectors.add(range(10), unit(10))
    vectors.save(tmp_path / "rows")
    before = (tmp_path / "rows").read_bytes()
    mapped = Vectors(WIDTH, tmp_path / "rows", writable=False)
    with pytest.raises(ValueError, match="only be searched"):
        mapped.add([10], unit(1))
    with pytest.raises(ValueError, match="only be searched"):
        mapped.remove([1])
    (tmp_path / "rows").unlink()  # a newer index took its place: what is mapped stays
    assert mapped.search(unit(10)[4:5], 1)[0][0][0] == 4
    mapped.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no index", b"\0" * 4096])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(ValueError, match="rows: not an index of usearch"):
        Vectors(WIDTH, tmp_path / "rows")


def test_another_width_is_refused(tmp_path: Path) -> None:
    Vectors(WIDTH + 1).save(tmp_path / "rows")
    with pytest.raises(ValueError, match="not float32 rows of 24"):
        Vectors(WIDTH, tmp_path / "rows")
