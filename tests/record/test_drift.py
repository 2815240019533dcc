"""Drift: planted shifts are found, equal windows raise no alarm, p-values are those expected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from multimodal.cli import main
from multimodal.record.chain import Entry, Record, entries
from multimodal.record.drift import EMBEDDINGS, drift, energy_test, requests_of


def requests(seed: int, count: int, **shift: float) -> list[Entry]:
    """Requests of chats as a server notes them, with lengths and likelihoods like real ones."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        written = int(rng.lognormal(2.5 + shift.get("length", 0), 0.4))
        facts: dict[str, Any] = {
            "path": "/v1/chat/completions",
            "status": 500 if rng.random() < 0.02 + shift.get("errors", 0) else 200,
            "usage": {"prompt_tokens": int(rng.integers(20, 60)), "completion_tokens": written},
            "likelihood": float(rng.normal(-1.2 - shift.get("unsure", 0), 0.3)),
            "seconds": float(rng.gamma(2, 0.2)),
            "finish_reasons": ["length" if rng.random() < 0.05 else "stop"],
        }
        made.append(Entry(number, "", facts, {}, {}, ""))
    return made


@pytest.mark.parametrize(
    ("shift", "signal"),
    [
        ({"length": 0.3}, "tokens written"),
        ({"unsure": 0.2}, "log-likelihood of a token"),
        ({"errors": 0.1}, "errors"),
    ],
)
def test_a_planted_shift_is_found_within_two_hundred_requests(
    shift: dict[str, float], signal: str
) -> None:
    results = drift(requests(0, 1000), requests(1, 200, **shift))
    assert [result.signal for result in results if result.alarm] == [signal]
    assert results[0].signal == signal and "ALARM" in str(results[0])


def test_twenty_windows_without_a_shift_raise_no_alarm() -> None:
    reference = requests(0, 1000)
    for seed in range(1, 21):
        assert not [r for r in drift(reference, requests(seed, 200)) if r.alarm]


def test_false_alarms_are_as_rare_as_is_said() -> None:
    """With alpha 0.2 at most a fifth of 200 windows, and not none: the tests have power."""
    reference = requests(0, 4000)
    alarms = sum(
        any(result.alarm for result in drift(reference, requests(seed, 100), alpha=0.2))
        for seed in range(1, 201)
    )
    assert 3 <= alarms <= stats.binom.ppf(0.999, 200, 0.2)


def test_an_energy_distance_is_that_of_its_definition_and_its_p_value_is_even() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(30, 3))

    def mean(x: Any, y: Any) -> float:
        return float(np.mean([np.linalg.norm(u - v) for u in x for v in y]))

    distance, _ = energy_test(a.astype(np.float32), b.astype(np.float32))
    assert distance == pytest.approx(2 * mean(a, b) - mean(a, a) - mean(b, b), rel=1e-4)
    values = []
    for seed in range(60):
        rows = np.random.default_rng(seed).normal(size=(60, 4)).astype(np.float32)
        values.append(energy_test(rows[:30], rows[30:], seed)[1])
    assert stats.kstest(values, "uniform").pvalue > 0.01
    moved = rng.normal(size=(100, 4)).astype(np.float32)
    assert energy_test(moved, moved + 0.8)[1] == 0.001


def test_other_subjects_are_found_by_their_embeddings() -> None:
    rng = np.random.default_rng(0)
    before, same = (rng.normal(size=(300, 32)).astype(np.float32) for _ in range(2))
    reference, window = requests(0, 300), requests(1, 200)
    embedded = before, same[:200]
    assert not any(r.alarm for r in drift(reference, window, embedded=embedded))
    found = drift(reference, window, embedded=(before, same[:200] + 0.3))
    assert [r.signal for r in found if r.alarm] == [EMBEDDINGS]


def test_callers_without_a_key_are_no_requests() -> None:
    """Records of older servers have them."""
    known = requests(0, 100)
    refused = [
        Entry(number, "", {"path": known[0].facts["path"], "status": status}, {}, {}, "")
        for number, status in enumerate((401, 403) * 200)
    ]
    assert requests_of([*known, *refused]) == known
    pruned = Entry(0, "", {"kind": "prune", "path": known[0].facts["path"]}, {}, {}, "")
    assert requests_of([pruned, *known]) == known


def test_the_command_compares_two_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, made in (
        ("before", requests(0, 300)),
        ("same", requests(1, 200)),
        ("longer", requests(2, 200, length=0.5)),
        ("short", requests(3, 5)),
    ):
        record = Record(tmp_path / name)
        for entry in made:
            record.append(entry.facts, {"prompt": "a red bus"})
        record.append({"kind": "feedback", "path": "/v1/feedback", "rating": "up"})
        record.append({"path": "/v1/embeddings", "status": 200})
        record.close()
    found = [entry for entry in entries(tmp_path / "same") if isinstance(entry, Entry)]
    assert len(requests_of(found)) == 200 and len(requests_of(found, "/v1/embeddings")) == 1
    before = str(tmp_path / "before")
    assert main(["drift", before, str(tmp_path / "same")]) == 0
    assert "ALARM" not in capsys.readouterr().out
    assert main(["drift", before, str(tmp_path / "longer"), "--json"]) == 1
    first, *_ = capsys.readouterr().out.splitlines()
    assert json.loads(first)["signal"] == "tokens written" and json.loads(first)["alarm"]
    assert main(["drift", before, str(tmp_path / "short")]) != 0
    assert "the window has 5 requests: 20 at least are needed" in capsys.readouterr().err
    assert main(["drift", before, str(tmp_path / "same"), "--embed"]) != 0
    assert "has no texts" in capsys.readouterr().err


def test_prompts_that_are_too_long_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Callable[..., Any]
) -> None:
    tiny_model(noise=0.1).save(folder := tmp_path / "model")
    for name in ("before", "now"):
        record = Record(tmp_path / name, keep_texts=True)
        for number, entry in enumerate(requests(0, 40)):
            record.append(
                entry.facts, {"prompt": "long " * 2000 if number < 3 else f"bus {number}"}
            )
        record.close()
    files = [str(tmp_path / name) for name in ("before", "now")]
    assert main(["drift", *files, "--embed", "--model", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert f"{EMBEDDINGS}: 0 before" in out and err.count("left out: 3 prompts") == 2
