"""``multimodal log``: check the record of a server, and read what is in it."""

import json
from pathlib import Path
from typing import Any

from multimodal.record.chain import Entry, entries, parse_time, verify
from multimodal.record.report import EXAMPLES, countable_entries, failures, summary
from multimodal.record.retention import prune, redact
from multimodal.terminal import Parser, print_error

EPILOG = """`multimodal serve --record FILE` writes the record. Each entry has the hash of the one
before: one that was changed, moved, or removed is named. Who can write the file can
also cut its end off, or make a new chain: note the last hash elsewhere (verify prints it), and give
it to --head later. report and failures name on stderr each line that cannot be counted, and the
exit status is then 1.

examples:
  multimodal log verify record.jsonl
  multimodal log verify record.jsonl --head 3f1c...
  multimodal log report record.jsonl --json
  multimodal log report record.0.jsonl record.1.jsonl    # of several workers
  multimodal log failures record.jsonl
  multimodal log redact record.jsonl --before 2026-11-01     # texts go, their digests stay
  multimodal log prune record.jsonl --before 2026-01-01      # entries go
"""


def main(argv: list[str]) -> int:
    """Run ``multimodal log ARGV...``.

    The exit status is 1 if a record does not hold, or has lines that cannot be counted.
    """
    parser = Parser(
        prog="multimodal log",
        description="Check the record of a server, and read what is in it.",
        epilog=EPILOG,
    )
    parser.add_argument("what", choices=("verify", "report", "failures", "redact", "prune"))
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--head", metavar="HASH", help="verify: a hash that was noted before")
    parser.add_argument("--before", metavar="TIME", help="redact, prune: 2026-11-28, in UTC")
    parser.add_argument("--json", action="store_true", help="report, failures: one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.what == "verify":
        if arguments.head and len(arguments.files) > 1:
            parser.error("--head is of one FILE")
        return max(_verify(file, arguments.head) for file in arguments.files)
    if arguments.what in ("redact", "prune"):
        if arguments.before is None:
            parser.error(f"{arguments.what} needs --before TIME")
        before = parse_time(arguments.before)
        change = redact if arguments.what == "redact" else prune
        count = sum(change(file, before) for file in arguments.files)
        print(f"{count:,} entries " + ("lost their texts" if change is redact else "were removed"))
        return 0
    problems: list[str] = []
    found = [
        entry for file in arguments.files for entry in countable_entries(file, problems.append)
    ]
    for problem in problems:
        print_error(f"multimodal log: left out: {problem}")
    if len(arguments.files) > 1:  # feedback may be in another file than what it is about
        found.sort(key=lambda entry: str(entry.facts.get("time")))
    if arguments.what == "report":
        facts = summary(found)
        print(json.dumps(facts) if arguments.json else "\n".join(_lines(facts)))
        return int(bool(problems))
    groups = failures(found)
    if arguments.json:
        print(json.dumps({name: [dict(e.facts) for e in each] for name, each in groups.items()}))
        return int(bool(problems))
    for name, each in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"{name}: {len(each):,}")
        for entry in each[-EXAMPLES:]:
            about, text = entry.facts, str(entry.texts.get("prompt", ""))[:80]
            called = about.get("id") or about.get("request")
            print(f"  entry {entry.number}, {about.get('time')}, {called} {text!r}")
    if not groups:
        print("no failures")
    return int(bool(problems))


def _verify(file: Path, head: str | None) -> int:
    problems = verify(file, head)
    for problem in problems:
        print(problem)
    found = [entry for entry in entries(file) if isinstance(entry, Entry)]
    if problems:
        print(f"{file}: {len(problems):,} problems in {len(found):,} entries")
        return 1
    if not found:
        print(f"{file}: holds no entry")
        return 0
    first, last = found[0], found[-1]
    begun = f" from {first.number} on" if first.number else ""
    print(f"{file}: {len(found):,} entries{begun}, nothing shows. The last hash: {last.hash}")
    return 0


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
