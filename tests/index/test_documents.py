"""What is published about answers from documents says how sure it is."""

import json
from pathlib import Path

import pytest

from benchmarks.documents import share
from multimodal.eval.metrics.proportions import Rate

RESULTS = [*(Path(__file__).parents[2] / "docs").glob("documents*.json")]


def test_none_of_two_hundred_is_not_certainty() -> None:
    none = share([False] * 200)
    assert none["low"] == 0 and none["high"] == pytest.approx(0.0188, abs=1e-4)
    assert share([True] * 9 + [False] * 191)["value"] == 0.045


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_published_intervals_belong_to_their_counts(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    rates = [row[name] for row in content["rows"].values() for name in ("right", "wrong")]
    for each in [*content["found"].values(), *rates]:
        rate = Rate(round(each["value"] * content["facts"]), content["facts"])
        assert (each["low"], each["high"]) == pytest.approx(rate.interval)
