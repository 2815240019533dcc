"""``multimodal provenance``: what the content credentials of pictures say."""

import json
from pathlib import Path

from multimodal.files import read_bytes
from multimodal.origin.credentials import read_credentials
from multimodal.terminal import Parser, print_error

EPILOG = """`multimodal draw --sign KEYS`, edit and serve write credentials: that a model drew this,
which model, the SHA-256 of the prompt. Those of others are read, too. Nothing is fetched. Without
credentials nothing is known: they are lost where a picture is saved again. The exit status is 0 if
every file has credentials that hold, else 1.

examples:
  multimodal provenance drawing.png
  multimodal provenance *.png --json
  multimodal provenance drawing.png --trust certificates.pem
"""


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="multimodal provenance",
        description="What the content credentials (C2PA) of pictures say, and whether they hold.",
        epilog=EPILOG,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="PNG, JPEG or WebP")
    parser.add_argument(
        "--trust", type=Path, metavar="FILE", help="certificates (PEM) of those whom you trust"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args(argv)
    trusted = read_bytes(arguments.trust) if arguments.trust else b""
    status = 0
    for file in arguments.files:
        try:
            finding = read_credentials(file, trusted)
        except (ValueError, OSError) as error:
            if len(arguments.files) == 1:
                raise
            print_error(f"multimodal provenance: error: {error}")
            status = 1
            continue
        if finding.state not in ("valid", "trusted"):
            status = 1
        if arguments.json:
            print(json.dumps({"file": str(file), **finding.to_json()}))
        else:
            print("\n  ".join([f"{file}:", *finding.lines()]))
    return status
