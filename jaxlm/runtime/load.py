"""Measures what a process takes of its machine: processor cores, memory, and the memory of its devices."""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

STATM = Path("/proc/self/statm")


class Load:
    """A Load measures from one reading to the next."""

    def __init__(self, devices: Sequence[jax.Device], now: Callable[[], float] = time.perf_counter) -> None:
        """`devices`: those of this process."""
        self._devices, self._now = devices, now
        self._last = now(), _processor_seconds()

    def read(self) -> dict[str, float | None]:
        """Returns `cpu`, the cores that were busy on average since the last reading; `memory_bytes`, what the process
        holds now (where the system doesn't tell, the most that it held); and `device_bytes`, what is in use on the
        fullest device, None where devices don't tell."""
        (before, spent), self._last = self._last, (self._now(), _processor_seconds())
        in_use = [stats["bytes_in_use"] for device in self._devices if (stats := device.memory_stats())]
        return {
            "cpu": (self._last[1] - spent) / max(self._last[0] - before, 1e-9),
            "memory_bytes": float(_memory_bytes()),
            "device_bytes": float(max(in_use)) if in_use else None,
        }


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _memory_bytes() -> int:
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
