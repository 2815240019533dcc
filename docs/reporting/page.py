"""docs/report.md: the parts between marks are filled from JSON, everything else is written.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``. A number stands in
``<!--REPORT FOLDER TASK SCORE:FORM-->0.163<!---->``.
"""

import re

from docs.reporting.results import DOCS, find, written
from docs.reporting.tables import TABLES

PAGE = DOCS / "report.md"
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"(<!--(\w+) (\w+) (\w+) ([\w@]+):([^>]+?)-->).*?(<!---->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with all that is marked made anew.

    Raises:
        ValueError: for an unknown table or a score that was not measured.
    """

    def table(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"table {name}: expected one of {', '.join(TABLES)}")
        return f"{start}\n{TABLES[name]()}\n\n{end}"

    def number(match: re.Match[str]) -> str:
        start, *place, form, end = match.groups()
        score = find(*place)
        if score is None:
            raise ValueError(f"{' '.join(place)}: not measured")
        return f"{start}{written(score.value, form)}{end}"

    return NUMBER.sub(number, TABLE.sub(table, text))
