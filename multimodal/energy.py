"""Energy of work, and the CO2 of making it: read from counters, or estimated and named so.

- CPU and memory: RAPL counters of Intel and AMD, as Linux shows them below /sys/class/powercap.
  They count the whole machine, with the work of others. Often only root may read them
  (CVE-2020-8694), and most virtual machines have none.
- Without them: CPU seconds of this process and of those that it started, times watts for a core.
- NVIDIA GPUs: the driver's counter of one device (the extra ``energy``). Nothing replaces it: the
  record then says that the GPU is not counted.

Screens, disks, fans, cooling and the making of the machine are never counted.
https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
"""

import os
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 5.0  # 280 W of an AMD EPYC 7763 are 4.4 W for each of its 64 cores, without memory
GRAMS_PER_KWH = 480.0  # CO2 equivalents of the world's electricity in 2023 (Ember)
# The smallest counters wrap at 65 kJ: after 160 s at 400 W.
SAMPLING_SECONDS = 20.0
JOULES_PER_WATT_HOUR = 3600.0


@dataclass(frozen=True)
class EnergyOptions:
    """What energy is computed with.

    Args:
        watts_per_core: of a busy core, for the estimate.
        grams_per_kwh: CO2 equivalents of the electricity in use. It differs twentyfold by country.

    Raises:
        ValueError: if one is negative.
    """

    watts_per_core: float = WATTS_PER_CORE
    grams_per_kwh: float = GRAMS_PER_KWH

    def __post_init__(self) -> None:
        if not (self.watts_per_core >= 0 and self.grams_per_kwh >= 0):
            raise ValueError(
                f"watts_per_core {self.watts_per_core}, grams_per_kwh {self.grams_per_kwh}: "
                "expected 0 or more"
            )


@dataclass(frozen=True)
class Energy:
    """Energy of some work.

    Args:
        joules: all that was counted.
        grams_per_kwh: see ``EnergyOptions``.
        how: how it was counted, in words: "measured ..." or "estimated ...".
    """

    joules: float
    grams_per_kwh: float
    how: str

    @property
    def watt_hours(self) -> float:
        return self.joules / JOULES_PER_WATT_HOUR

    @property
    def co2_grams(self) -> float:
        return self.watt_hours / 1000 * self.grams_per_kwh

    def __str__(self) -> str:
        return (
            f"{self.watt_hours:,.3g} Wh, {self.co2_grams:,.3g} g CO2 at {self.grams_per_kwh:g} g a "
            f"kWh; {self.how}"
        )


class Rapl:
    """The energy of all processors and their memory, by RAPL counters, which wrap around.

    Args:
        folder: of the counters.

    Raises:
        OSError: if there are none, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        # A processor and each of its parts have a zone. Its cores and GPU are within the processor,
        # its memory (dram) is not.
        zones = [
            zone
            for zone in sorted(folder.glob("intel-rapl:*"))
            if (zone / "name").read_text("ascii").startswith(("package", "dram"))
        ]
        if not zones:
            raise FileNotFoundError(f"{folder}: no RAPL counters")
        self._joules = 0.0
        self._ranges = {z: int((z / "max_energy_range_uj").read_text("ascii")) for z in zones}
        self._last = {zone: self._count(zone) for zone in zones}

    @staticmethod
    def _count(zone: Path) -> int:
        return int((zone / "energy_uj").read_text("ascii"))

    def joules(self) -> float:
        """Joules since the start. Call it before a counter can wrap around twice."""
        for zone, last in self._last.items():
            now = self._count(zone)
            self._joules += (now - last) % (self._ranges[zone] + 1) / 1e6
            self._last[zone] = now
        return self._joules


def cpu_seconds(without: Collection[int] = ()) -> float:
    """CPU seconds of this process and of all that it started, ended or not.

    Outside Linux those that still run are left out.

    Args:
        without: processes that it started, of which and of whose children others count the time.
    """
    times = os.times()
    total = time.process_time() + times.children_user + times.children_system
    waiting = [pid for pid in _children(os.getpid()) if pid not in without]
    while waiting:
        pid = waiting.pop()
        waiting += _children(pid)
        with suppress(OSError):  # it has ended
            # The name, in parentheses, may contain anything.
            stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2]
            # User and system time of it, and of those of its children that have ended.
            total += sum(map(int, stat.split()[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def _children(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            children += map(int, path.read_text("ascii").split())
    return children


class _Gpu:
    """The counter of one NVIDIA GPU. Other processes on it count too."""

    def __init__(self, device: "torch.device") -> None:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self._start = self._read(self._handle)  # millijoules

    def joules(self) -> float:
        return (self._read(self._handle) - self._start) / 1e3


class EnergyMeter:
    """Counts energy from its creation on. ``close`` it, or use it in a ``with``.

    Args:
        device: that the work runs on.
        options: for the estimate and for CO2.
        counts_machine: whether this process counts the whole machine, if that is possible. Of
            several processes on a machine only one may.
        powercap: the folder of RAPL counters. None: ``POWERCAP``.
        without: see ``cpu_seconds``.
    """

    def __init__(
        self,
        device: "torch.device | None" = None,
        options: EnergyOptions = EnergyOptions(),  # noqa: B008 (frozen)
        counts_machine: bool = True,
        powercap: Path | None = None,
        without: Collection[int] = (),
    ) -> None:
        self.options, self._without = options, without
        self._counts_machine = counts_machine
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._rapl: Rapl | None = None
        self._gpu: _Gpu | None = None
        self._gpu_note = ""
        self._start = 0.0
        try:
            self._rapl = Rapl(powercap or POWERCAP)
        except (OSError, ValueError):
            self._start = cpu_seconds(without)
        else:
            threading.Thread(target=self._keep_reading, daemon=True).start()
        if device is not None and device.type != "cpu":
            self._gpu_note = f"{device.type} is not counted"
        if device is not None and device.type == "cuda":
            try:
                self._gpu = _Gpu(device)
            except ImportError:
                self._gpu_note = "the GPU is not counted: pip install multimodal[energy]"
            except Exception as error:  # NVMLError: by the driver and by MIG
                self._gpu_note = f"the GPU is not counted: {error}"

    def _keep_reading(self) -> None:
        while not self._closed.wait(SAMPLING_SECONDS):
            self._machine_joules()

    def _machine_joules(self) -> float:
        assert self._rapl is not None
        with self._lock:
            return self._rapl.joules()

    def read(self) -> Energy:
        """The energy so far."""
        if self._rapl is None:
            seconds = cpu_seconds(self._without) - self._start
            joules = seconds * self.options.watts_per_core
        else:
            joules = self._machine_joules() if self._counts_machine else 0.0
        if self._gpu is not None:
            joules += self._gpu.joules()
        return Energy(joules, self.options.grams_per_kwh, self.how)

    @property
    def how(self) -> str:
        """How energy is counted, in words."""
        if self._rapl is not None:
            cpu = "measured by RAPL, the whole machine"
        else:
            cpu = f"estimated: CPU seconds x {self.options.watts_per_core:g} W a core"
        gpu = "the GPU measured by NVML" if self._gpu is not None else self._gpu_note
        return "; ".join(part for part in (cpu, gpu) if part)

    def close(self) -> None:
        """Stop reading. ``read`` still works."""
        self._closed.set()

    def __enter__(self) -> "EnergyMeter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
