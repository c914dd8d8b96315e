"""The processes of a run: started by whatever launcher there is, of one mind, and ended together.

A program calls `start` once, before anything touches a device. Where a launcher tells of several processes they call
the roll (see `rollcall`), then start `jax.distributed`; else nothing happens, and every function here is free.
"""

import atexit
import os
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any, NoReturn

from jaxlm.runtime import launchers, rollcall
from jaxlm.runtime.rollcall import ProcessError

__all__ = [
    "ProcessError",
    "barrier",
    "behind",
    "enough_threads",
    "exit_with",
    "failed",
    "joined",
    "last_words",
    "start",
    "step",
    "told",
]

THREADS = 64

_place = launchers.Place("")
_roll: rollcall.Roll | None = None


def start(agreed: Mapping[str, Any] | None = None) -> None:
    """Find out which process this is, and join the others if there are any.

    agreed: what must be the same on all of them, by name; packages are compared as well. Environment: see `clusters`,
    and `JAXLM_START_SECONDS` (300) to wait for the others. ValueError: the processes don't fit together;
    ProcessError: some never came.
    """
    global _place, _roll
    seconds = _seconds()
    _place = launchers.find(os.environ, seconds)
    if _place.count == 1 or _roll is not None:
        return
    enough_threads(several=True)
    import jax

    same = {"the number of processes": _place.count, "jax": jax.__version__, "jaxlm": metadata.version("jaxlm")}
    _roll = rollcall.Roll(_place, same | dict(agreed or {}), seconds)
    devices = None if _place.devices is None else list(_place.devices)
    jax.distributed.initialize(
        _place.address, _place.count, _place.index, devices, "deactivate", initialization_timeout=max(60, int(seconds))
    )
    atexit.register(_roll.leave)  # before JAX's own farewell, which was registered earlier


def enough_threads(several: bool = False) -> None:
    """Before JAX looks at a CPU that it takes for several devices, or whose processes meet others.

    A device waits for the others on a thread of XLA's, of which it makes one for each device or core. Two sums that a
    program may run in either order can then hold all threads and wait for each other (seen with eight devices on two
    busy cores). XLA reads their number from `NPROC`; a number that is set already stays.
    """
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if several or (forced and int(forced[1]) > 1):
        os.environ.setdefault("NPROC", str(max(THREADS, 8 * int(forced[1]) if forced else 0)))


def _seconds() -> float:
    given = os.environ.get("JAXLM_START_SECONDS", "300")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"JAXLM_START_SECONDS: {given!r} is no number of seconds above 0")
    return seconds


def told() -> str:
    """What was found, for a run's notes; names no host. Empty: no launcher."""
    return f"{_place.count}, by {_place.found}" if _place.count > 1 else _place.found


def barrier(place: str, seconds: float) -> None:
    """Until every process is at `place`; if some don't come within `seconds` after the first, all end and name them."""
    if _roll is not None:
        _roll.barrier(place, seconds)


def step(number: int) -> None:
    """This process has sent update `number` to its devices."""
    if _roll is not None:
        _roll.step(number)


def behind() -> str:
    """On process 0 of a run that is stuck: which processes have sent fewer updates than others; empty: none."""
    if _roll is None or _roll.desk is None or not _roll.desk.steps:
        return ""
    steps = _roll.desk.steps | {0: max(_roll.desk.steps.get(0, -1), _roll.at)}
    last = max(steps.values())
    late = [f"process {i} ({_roll.hosts[i]}) is at step {n}" for i, n in sorted(steps.items()) if n < last]
    return f"{rollcall.few(late)}, the others at {last}" if late else ""


def last_words(text: str) -> None:
    """What is said besides the reason when another process ends this one: how to go on."""
    if _roll is not None:
        _roll.last_words = text


def exit_with(line: str, status: int) -> NoReturn:
    """End this process from any of its threads, and the others of its run with it."""
    if _roll is not None:
        failed(line, status)
    rollcall.leave_at_once(status)


def joined() -> bool:
    """Whether this process is one of several."""
    return _roll is not None


def failed(line: str, status: int) -> NoReturn:
    """One of several can't go on: says so here and to the others, and exits at once, for the wait for each other that
    JAX puts at a program's end would never be over. Another's death that was the cause is told instead."""
    assert _roll is not None
    _roll.fail(line, status)
    print(f"jaxlm: {line}", file=sys.stderr, flush=True)
    rollcall.leave_at_once(status)
