"""Which texts have the words of a query: BM25 (Robertson and Zaragoza 2009), by SQLite's FTS5.

Names and numbers that no model has read are found by their letters. Case and accents do not count,
and English words are compared by their stems (Porter 1980).
"""

import re
import sqlite3
from collections.abc import Iterable

MOST_TERMS = 64  # of a query, the rarest
COMMON = 0.25  # a word in more of the texts is looked up only if the query has no other


class Words:
    """Texts by their words, in memory.

    Args:
        texts: each with its number.

    Raises:
        ValueError: if this Python's SQLite has no FTS5.
    """

    def __init__(self, texts: Iterable[tuple[int, str]]) -> None:
        # A search may come from another thread than the one that opened the index.
        self._base = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._base.execute(
                "CREATE VIRTUAL TABLE texts USING fts5"
                "(text, content='', columnsize=1, tokenize='porter unicode61')"
            )
        except sqlite3.OperationalError as error:
            raise ValueError(f"to search texts Python needs SQLite with FTS5 ({error})") from error
        self._base.executemany("INSERT INTO texts(rowid, text) VALUES (?, ?)", texts)
        (self._count,) = self._base.execute("SELECT count(*) FROM texts").fetchone()

    def search(self, query: str, k: int) -> dict[int, float]:
        """The k texts with most of a query, the best first: the BM25 of each, divided by that of
        the first. Of a text with none of its words there is nothing.
        """
        counts = {f'"{term}"': 0 for term in re.findall(r"\w+", query)}
        for term in counts:
            (counts[term],) = self._base.execute(
                "SELECT count(*) FROM texts WHERE texts MATCH ?", (term,)
            ).fetchone()
        known = sorted((term for term in counts if counts[term]), key=lambda term: counts[term])
        rare = [term for term in known if counts[term] <= COMMON * self._count] or known
        if not rare:
            return {}
        found = self._base.execute(
            "SELECT rowid, -bm25(texts) FROM texts WHERE texts MATCH ? "
            "ORDER BY bm25(texts), rowid LIMIT ?",
            (" OR ".join(rare[:MOST_TERMS]), k),
        ).fetchall()
        return {number: score / found[0][1] for number, score in found}
