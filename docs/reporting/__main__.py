"""Make the report anew: its numbers and figures from JSON, and a PDF.

    python -m docs.reporting                          # docs/report.md, docs/images/report_*.svg
    python -m docs.reporting --pdf build/report.pdf   # and the PDF

``make report`` does the second.
"""

import argparse
from pathlib import Path

from docs.reporting.figures import FIGURES, draw, path_of
from docs.reporting.page import PAGE, filled


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pdf", type=Path, metavar="FILE", help="write the PDF, too")
    arguments = options.parse_args()
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
    for name in FIGURES:
        draw(name, path_of(name))
    if arguments.pdf:
        from docs.reporting.pdf import write_pdf

        write_pdf(PAGE, arguments.pdf)
        print(arguments.pdf)


if __name__ == "__main__":
    main()
