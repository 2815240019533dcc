"""Energy: counters that wrap around, CPU time of child processes, and what a record says."""

import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from multimodal.energy import Energy, EnergyMeter, EnergyOptions, Rapl, cpu_seconds

BURN = "import time\nwhile time.process_time() < {}: pass\n{}"


def zones(folder: Path, counts: dict[str, tuple[str, int]], most: int = 999_999) -> None:
    """Zones as the kernel shows them: name of a folder -> name of the zone and microjoules."""
    for zone, (name, count) in counts.items():
        (folder / zone).mkdir(parents=True, exist_ok=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "energy_uj").write_text(f"{count}\n")
        (folder / zone / "max_energy_range_uj").write_text(f"{most}\n")


def test_processors_and_memory_count_once_and_counters_wrap(tmp_path: Path) -> None:
    names = {
        "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "uncore",
        "intel-rapl:0:2": "dram", "intel-rapl:1": "package-1", "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }  # fmt: skip
    zones(tmp_path, {zone: (name, 900_000) for zone, name in names.items()})
    counter = Rapl(tmp_path)
    assert counter.joules() == 0
    zones(tmp_path, {zone: (name, 950_000) for zone, name in names.items()})
    assert counter.joules() == pytest.approx(3 * 0.05), "two processors and the memory"
    zones(tmp_path, {zone: (name, 100_000) for zone, name in names.items()})
    assert counter.joules() == pytest.approx(3 * 0.2)
    with (
        EnergyMeter(powercap=tmp_path) as meter,
        EnergyMeter(powercap=tmp_path, counts_machine=False) as other,
    ):
        zones(tmp_path, {"intel-rapl:1": ("package-1", 200_000)})
        assert meter.read().joules == pytest.approx(0.1) and other.read().joules == 0
        assert meter.how == "measured by RAPL, the whole machine"


def test_without_counters_energy_is_an_estimate_and_is_called_so(tmp_path: Path) -> None:
    with EnergyMeter(options=EnergyOptions(watts_per_core=7), powercap=tmp_path) as meter:
        start = time.process_time()
        while time.process_time() < start + 0.2:
            pass
        energy, burnt = meter.read(), time.process_time() - start
    assert 7 * 0.2 <= energy.joules <= 7 * (burnt + 0.1)
    assert energy.how == "estimated: CPU seconds x 7 W a core"
    with pytest.raises(ValueError, match="expected 0 or more"):
        EnergyOptions(grams_per_kwh=-1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_child_processes_count_while_they_run_and_after(tmp_path: Path) -> None:
    """A child, and a child of it, each with 0.3 s."""
    inner = BURN.format(0.3, "")
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {inner!r}])\n"
    script += BURN.format(0.3, "print(flush=True); input()")
    before = cpu_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running, without = cpu_seconds() - before, cpu_seconds((child.pid,)) - before
        child.communicate(b"\n")
    ended = cpu_seconds() - before
    assert 0.6 - 0.04 < running <= ended + 0.04, "ticks of 10 ms"
    assert without < 0.3, "those of the child are counted by itself"


def test_units() -> None:
    energy = Energy(7.2e6, 500, "estimated")
    assert energy.watt_hours == 2000 and energy.co2_grams == 1000
    assert "2e+03 Wh, 1e+03 g CO2 at 500 g a kWh; estimated" == str(energy)


def test_a_gpu_is_measured_by_its_driver_or_named_as_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = types.SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    counts = iter([5_000, 8_000])
    driver = types.ModuleType("pynvml")
    driver.nvmlInit = lambda: None  # type: ignore[attr-defined]
    driver.nvmlDeviceGetHandleByUUID = lambda uuid: uuid  # type: ignore[attr-defined]

    def energy(handle: str) -> int:
        assert handle == "GPU-1-2"
        return next(counts)

    driver.nvmlDeviceGetTotalEnergyConsumption = energy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    options, device = EnergyOptions(watts_per_core=0), torch.device("cuda")
    with EnergyMeter(device, options, powercap=tmp_path) as meter:
        assert meter.read().joules == 3 and meter.how.endswith("the GPU measured by NVML")

    def fail(handle: str) -> int:
        raise RuntimeError("Not Supported")

    driver.nvmlDeviceGetTotalEnergyConsumption = fail  # type: ignore[attr-defined]
    with EnergyMeter(device, options, powercap=tmp_path) as meter:
        assert meter.how.endswith("the GPU is not counted: Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with EnergyMeter(device, options, powercap=tmp_path) as meter:
        assert meter.how.endswith("the GPU is not counted: pip install multimodal[energy]")
