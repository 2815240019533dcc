"""The script that measures a card runs on a CPU with tiny sizes, so that it cannot rot."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.processes import living, wait_until

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PARTS = ("floors", "train_1b", "decode", "train_large", "draw", "tokenize", "their_decode",
         "their_train")  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_the_parts_are_those_that_are_tested_and_the_tests(gpu: ModuleType) -> None:
    assert sorted(gpu.PARTS) == sorted((*PARTS, "tests"))
    assert sum(part.seconds for part in gpu.PARTS.values()) <= gpu.SECONDS, "some have no time"
    assert list(gpu.PARTS).index("tests") < list(gpu.PARTS).index("train_large")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_measures_what_it_says(
    gpu: ModuleType, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.run_part(name, gpu.TINY) == 0
    lines = lines_of(capsys.readouterr().out)
    assert sorted(line["figure"] for line in lines) == sorted(gpu.parts(gpu.TINY)[name].figures)
    for line in lines:
        assert 0 < line["value"] < math.inf and line["unit"], line
        if line["figure"].endswith("kernels"):
            assert line["groups"]["products"] > 0 and line["launches"] > 0
            assert line["busy_ms"] == pytest.approx(sum(line["groups"].values()), rel=1e-2)
        if line["figure"].startswith("train/") and line["figure"].endswith("kernels"):
            assert set(line["phases_ms"]) == {"forward", "backward", "clip", "optimizer"}
            assert min(line["phases_ms"].values()) > 0


def test_a_part_that_fails_is_named_and_what_it_measured_stays(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(sizes: Any) -> Any:
        yield gpu.Figure("one", 1.23456, "s")
        raise RuntimeError("CUDA out of memory")

    part = {"floors": gpu.Part(broken, 5, ["one", "two"])}
    monkeypatch.setattr(gpu, "parts", lambda sizes: part)
    assert gpu.run_part("floors", gpu.TINY) == 1
    first, second = lines_of(capsys.readouterr().out)
    assert first == {"figure": "one", "value": 1.235, "unit": "s"}
    assert second == {"failed": "floors", "reason": "RuntimeError: CUDA out of memory"}


PROGRAMS = {
    "floors": 'print(\'a library speaks\'); print(\'{"figure": "a", "value": 1}\')',
    "train_1b": 'print(\'{"figure": "b", "value": 2}\', flush=True); import time; time.sleep(60)',
    "decode": "import os; os._exit(9)",
    "draw": 'print(\'{"failed": "draw", "reason": "known"}\'); raise SystemExit(1)',
    "tokenize": 'print(\'{"figure": "c", "value": 3}\')',
}


def test_parts_hang_end_or_fail_and_the_others_go_on(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PROGRAMS:
        limit = 6 if name == "train_1b" else 60
        monkeypatch.setitem(gpu.PARTS, name, gpu.Part(lambda sizes: iter(()), limit, []))
    lines = list(
        gpu.run_parts(list(PROGRAMS), 400, lambda name: [sys.executable, "-c", PROGRAMS[name]])
    )
    assert [line.get("figure") or line["failed"] for line in lines] == [
        "a", "b", "train_1b", "decode", "draw", "c",
    ]  # fmt: skip
    reasons = [line["reason"] for line in lines if "reason" in line]
    assert reasons == ["not done after 6 seconds", "the process ended with status 9", "known"]
    late = gpu.run_parts(["decode"], 1, lambda name: ["never"])
    assert [line["reason"] for line in late] == ["no time was left of 1 seconds"]


def test_what_a_part_has_started_ends_with_it(gpu: ModuleType, tmp_path: Path) -> None:
    """In time, too late, and when nobody reads on (Ctrl-C)."""
    child = [sys.executable, "-c", "import time; time.sleep(600)"]
    for number, (wait, limit) in enumerate(((0, 60), (600, 6), (600, 60))):
        path = tmp_path / str(number)
        program = f"""if True:
            import os, subprocess, time
            subprocess.Popen({child!r}, stdout=subprocess.DEVNULL)
            open({str(path)!r}, "w").write(str(os.getsid(0)))
            print('{{"figure": "a"}}', flush=True)
            time.sleep({wait})
        """
        lines = gpu.run_process([sys.executable, "-c", program], "tests", limit)
        assert next(lines) == {"figure": "a"}
        session = int(path.read_text())
        if limit == 60 and wait:
            lines.close()
        else:
            assert [line["failed"] for line in lines] == ["tests"] * bool(wait)
        assert session != os.getsid(0) and wait_until(lambda s=session: not living(s))


def test_the_file_keeps_what_was_not_measured_again(gpu: ModuleType) -> None:
    about = {"card": "H200", "date": "2026-02-01"}
    before = {
        "card": "H200",
        "figures": {
            "floors/copies": {"value": 1.0, "part": "floors", "date": "2026-01-01"},
            "decode/ready": {"value": 2.0, "part": "decode", "date": "2026-01-01"},
        },
    }
    lines = [
        {"figure": "decode/kernels", "value": 3.0, "unit": "ms", "part": "decode"},
        {"failed": "decode", "reason": "hung", "part": "decode"},
    ]
    after = gpu.summary(lines, ["decode"], before, about)
    assert set(after["figures"]) == {"floors/copies", "decode/kernels"}, "an old figure is not new"
    assert after["figures"]["floors/copies"]["date"] == "2026-01-01"
    assert after["figures"]["decode/kernels"]["date"] == "2026-02-01"
    assert [line["failed"] for line in after["failed"]] == ["decode"]
    assert "decode/ready" in after["missing"] and "decode/kernels" not in after["missing"]
    other = gpu.summary([], [], before, about | {"card": "H100"})
    assert not other["figures"], "another card has other figures"


def test_what_pytest_says_becomes_a_figure(gpu: ModuleType) -> None:
    said = "..F\nFAILED tests/a.py::test_b - assert 1\n1 failed, 31 passed, 2 skipped in 3.1s\n"
    figure = gpu.passed(said, 1)
    assert figure.value == 31 and figure.more["failed"] == 1 and figure.more["skipped"] == 2


def test_tests_that_cannot_run_are_an_error(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "ERROR tests/a.py - ImportError: no b\n1 skipped, 1 error in 3.1s\n"
    done = subprocess.CompletedProcess([], 2, said, "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: done)
    assert gpu.run_part("tests", gpu.TINY) == 1
    (line,) = lines_of(capsys.readouterr().out)
    assert line["failed"] == "tests"
    assert "pytest ended with status 2; ERROR tests/a.py - ImportError: no b" in line["reason"]


def test_a_span_that_a_program_names_is_no_kernel(gpu: ModuleType) -> None:
    """It lasts as long as the kernels in it, which are counted themselves."""
    import torch
    from on_card.sizes import kernels

    a = torch.ones(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")

    def work() -> None:
        with torch.profiler.record_function("Optimizer.step#AdamW.step"):
            a @ a

    found = kernels(work)
    assert "products" in found["groups"] and "optimizer" not in found["groups"]
    assert not any("AdamW" in name for name in found["top"])


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("triton_poi_fused__to_copy_mul_silu_3", "fused by the compiler"),
        ("triton_red_fused__to_copy_mean_pow_0", "fused by the compiler"),
        ("triton_per_fused__softmax_backward_1", "fused by the compiler"),
        ("triton_tem_fused_flex_attention_2", "attention"),
        ("nvjet_tst_128x256_64x4", "products"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
    ],
)
def test_a_kernel_is_in_the_group_of_what_it_does(gpu: ModuleType, kernel: str, group: str) -> None:
    from on_card.sizes import group_of

    assert group_of(kernel) == group


def test_the_layers_of_another_model_are_compiled_one_by_one(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from on_card.training import their_train

    compiled: list[str] = []

    def compile(function: Any, *_: Any, **__: Any) -> Any:
        compiled.append(type(getattr(function, "__self__", function)).__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    list(their_train(dataclasses.replace(gpu.TINY, compiled=True)))
    assert len(compiled) > 1 and set(compiled) == {"Qwen3DecoderLayer"}


def test_without_a_card_nothing_is_written(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu, "RESULTS", Path("nowhere/gpu.json"))
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--tiny" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    monkeypatch.setattr(gpu, "run_parts", lambda *_: iter([{"figure": "a", "value": 1}]))
    assert gpu.main() == 0
