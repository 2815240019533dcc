"""``multimodal drift``: whether the requests of a server have changed."""

import json
from pathlib import Path

import numpy as np
import torch

from multimodal.commands.options import load_model, make_parser
from multimodal.record.chain import Entry
from multimodal.record.drift import EMBEDDINGS, WINDOW, Rows, drift, prompts_of, requests_of
from multimodal.record.report import countable_entries
from multimodal.terminal import print_error

EPILOG = f"""Both are records of `multimodal serve --record`. The last requests of LOG are compared
with REFERENCE: lengths, likelihoods, seconds, errors, empty replies, and with --embed what prompts
are about (of records with texts: `serve --record-texts`). --alpha is the probability of an alarm
without a cause, of all tests together and if requests are independent. The exit status is 1 after
an alarm. `multimodal serve --drift-reference` has the same numbers in /metrics, and what prompts
are about where REFERENCE has texts.

examples:
  multimodal drift week1.jsonl today.jsonl
  multimodal drift week1.jsonl today.jsonl --window {WINDOW} --alpha 0.001 --json
  multimodal drift week1.jsonl today.jsonl --embed --model starter
"""


def main(argv: list[str]) -> int:
    parser = make_parser("drift", "Whether the requests of a server have changed.", EPILOG)
    parser.add_argument("reference", type=Path, metavar="REFERENCE")
    parser.add_argument("log", type=Path, metavar="LOG")
    parser.add_argument(
        "--window", type=int, default=WINDOW, help=f"the last requests of LOG (default {WINDOW})"
    )
    parser.add_argument("--alpha", type=float, default=0.01, help="(default 0.01)")
    parser.add_argument("--path", help="the address (default: that with the most requests)")
    parser.add_argument("--embed", action="store_true", help="compare what prompts are about, too")
    parser.add_argument("--json", action="store_true", help="one JSON object for each test")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.alpha < 1 or arguments.window < 1:
        raise ValueError("--alpha: expected 0 to 1; --window: 1 or more")
    sides = []
    path = arguments.path
    for file in (arguments.reference, arguments.log):
        found = countable_entries(
            file, lambda what: print_error(f"multimodal drift: left out: {what}")
        )
        sides.append(requests_of(found, path))
        path = path or (str(sides[0][0].facts.get("path")) if sides[0] else None)
    reference, window = sides[0], sides[1][-arguments.window :]
    embedded = None
    if arguments.embed:
        model = load_model(arguments)

        def rows(side: list[Entry]) -> Rows:
            texts = prompts_of(side)
            if not texts:
                raise ValueError("--embed: a record has no texts (serve with --record-texts)")
            found = [row for row in model.embed_lines(texts) if not isinstance(row, ValueError)]
            if missing := len(texts) - len(found):
                print_error(f"multimodal drift: left out: {missing} prompts that are too long")
            return torch.stack(found).numpy() if found else np.zeros((0, 1), np.float32)

        embedded = rows(reference), rows(window)
    results = drift(reference, window, arguments.alpha, embedded)
    for result in results:
        print(json.dumps(vars(result)) if arguments.json else result)
    if not arguments.embed and not arguments.json:
        print(f"{EMBEDDINGS}: not compared (--embed)")
    return int(any(result.alarm for result in results))
