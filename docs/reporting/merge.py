"""Put the results of a later ``multimodal eval`` into a report that docs/ has.

    multimodal eval scene_answers --data data/scenes --threads 1 --output build/more.json
    python -m docs.reporting.merge build/more.json docs/starter_val.json

A result of the same task and folder is replaced. Another one comes behind those of its folder. A
result that comes from a later run says so: ``run`` has what differs from the protocol on top of the
report, such as the commit.
"""

import argparse
import json
from pathlib import Path
from typing import Any

# Results of two runs belong in one report only if these are the same.
SAME = ("fingerprint", "adapter", "split", "image_size", "fit", "seed", "dtype", "clip")


def merged(report: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The report with the results of another run. Neither is changed.

    Raises:
        ValueError: if they are not of the same model, split and settings.
    """
    protocol, other = report["protocol"], more["protocol"]
    for name in SAME:
        if protocol.get(name) != other.get(name):
            raise ValueError(
                f"{name}: {protocol.get(name)} in the report, {other.get(name)} in the new results"
            )
    differs = {name: other[name] for name in other if other[name] != protocol.get(name)}
    results = list(report["results"])
    for new in more["results"]:
        new = {**new, "run": differs} if differs else new
        folder = Path(new["data"]).name
        of_folder = [n for n, each in enumerate(results) if Path(each["data"]).name == folder]
        same = [n for n in of_folder if results[n]["task"] == new["task"]]
        if same:
            results[same[0]] = new
        else:
            results.insert(of_folder[-1] + 1 if of_folder else len(results), new)
    return {"protocol": protocol, "results": results}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("more", type=Path, nargs="+", help="what multimodal eval wrote")
    options.add_argument("report", type=Path, help="a report of docs/, which is written anew")
    arguments = options.parse_args()
    report = json.loads(arguments.report.read_text("utf-8"))
    for path in arguments.more:
        report = merged(report, json.loads(path.read_text("utf-8")))
    arguments.report.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
