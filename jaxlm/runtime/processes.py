"""The processes of a run start by whatever launcher there is, agree on what they run, and end together.

A program calls `start` once, before anything touches a device. If a launcher says that there are several processes,
they call the roll (see `rollcall`) and then start `jax.distributed`; else nothing happens, and every function here
costs nothing.
"""

import atexit
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from importlib import metadata
from types import TracebackType
from typing import Any, NoReturn

from jaxlm.runtime import launchers, rollcall, rollcall_server
from jaxlm.runtime.rollcall import ProcessError

__all__ = [
    "ProcessError",
    "barrier",
    "describe_launcher",
    "describe_stragglers",
    "exit_with",
    "fail",
    "is_distributed",
    "reserve_threads",
    "set_exit_hint",
    "start",
    "step",
    "stop_with_input",
]

THREADS = 64
STOPS_WITH_INPUT = "JAXLM_STOPS_WITH_INPUT"
"""Variable of a process that is to stop, as by SIGTERM, when its standard input ends, for who started it is gone."""

_place = launchers.Place("")
_member: rollcall.Member | None = None


def start(agreed: Mapping[str, Any] | None = None) -> None:
    """Finds out which process this is, and joins the others if there are any.

    agreed: what must be the same on all of them, by name; packages are compared as well. `launchers` reads the
    environment; `JAXLM_START_SECONDS` (300) is how long to wait for the others. From then on an exception that nobody
    catches ends the others too, which would wait for this process. Raises ValueError if the processes don't fit
    together or jax has its devices already, and ProcessError if some never come.
    """
    global _place, _member
    seconds = _seconds()
    _place = launchers.find(os.environ, seconds)
    if _member is not None:
        return
    reserve_threads(several=_place.count > 1)
    if _place.count == 1:
        return
    import jax

    if jax.distributed.is_initialized():
        raise ValueError(
            "jax.distributed.initialize: was called before, so these processes can't call the roll; leave that call out"
        )
    compared = {"the number of processes": _place.count, "jax": jax.__version__, "jaxlm": metadata.version("jaxlm")}
    _member = rollcall.Member(_place, compared | dict(agreed or {}), seconds)
    devices = None if _place.devices is None else list(_place.devices)
    sys.excepthook = _end_all
    try:
        jax.distributed.initialize(
            _place.address, _place.count, _place.index, devices, "deactivate",
            initialization_timeout=max(60, int(seconds)),
        )  # fmt: skip
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # of the network, not of this program
            raise
        raise ValueError(
            "start_processes: jax had its devices before this process joined the others; call "
            "jaxlm.start_processes() before anything else"
        ) from error
    atexit.register(_member.leave)  # before JAX's own farewell, which was registered earlier


def _end_all(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Ends all processes because of an exception that nobody caught in this one."""
    sys.__excepthook__(kind, error, where)
    fail(f"{kind.__name__}: {next(iter(str(error).splitlines()), '')}", 1)


def reserve_threads(several: bool = False) -> None:
    """Reserves enough threads for a CPU that JAX takes for several devices, or whose processes meet others.

    It must be called before JAX looks at devices. A device waits for the others on a thread of XLA's, of which it makes
    one for each device or core. Two sums that a program may run in either order can then hold all threads and wait for
    each other (seen with eight devices on two busy cores). XLA reads their number from `NPROC`; a number that is set
    already stays.
    """
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if several or (forced and int(forced[1]) > 1):
        os.environ.setdefault("NPROC", str(max(THREADS, 8 * int(forced[1]) if forced else 0)))


def _seconds() -> float:
    value = os.environ.get("JAXLM_START_SECONDS", "300")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"JAXLM_START_SECONDS: {value!r} is no number of seconds above 0")
    return seconds


def stop_with_input() -> None:
    """Sends this process SIGTERM when its standard input ends, if the variable `STOPS_WITH_INPUT` says so."""
    if not os.environ.pop(STOPS_WITH_INPUT, ""):  # processes that this one starts have other inputs
        return

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="stop-with-input").start()


def describe_launcher() -> str:
    """Returns how many processes there are and what started them, for a run's notes; empty: no launcher."""
    return f"{_place.count}, by {_place.launcher}" if _place.count > 1 else _place.launcher


def barrier(place: str, seconds: float) -> None:
    """Waits until every process is at `place`.

    If some don't come within `seconds` of the first, all end and name them.
    """
    if _member is not None:
        _member.barrier(place, seconds)


def step(number: int) -> None:
    """Notes that this process has sent update `number` to its devices."""
    if _member is not None:
        _member.step(number)


def describe_stragglers() -> str:
    """Returns, on process 0, which processes have sent fewer updates than others; empty: none, or another process."""
    if _member is None or _member.server is None or not _member.server.steps:
        return ""
    steps = _member.server.steps | {0: max(_member.server.steps.get(0, -1), _member.last_step)}
    latest = max(steps.values())
    late = [f"process {i} ({_member.hosts[i]}) is at step {n}" for i, n in sorted(steps.items()) if n < latest]
    return f"{rollcall_server.few(late)}, the others at {latest}" if late else ""


def set_exit_hint(text: str) -> None:
    """Sets what is printed after the reason if another process ends this one: how to go on."""
    if _member is not None:
        _member.exit_hint = text


def exit_with(line: str, status: int) -> NoReturn:
    """Ends this process from any of its threads, and the others of its run with it."""
    if _member is not None:
        fail(line, status)
    rollcall.leave_at_once(status)


def is_distributed() -> bool:
    """Returns whether this process is one of several."""
    return _member is not None


def fail(line: str, status: int) -> NoReturn:
    """Ends this process, which is one of several and can't go on, and tells the others why.

    It exits at once, for JAX's processes wait for each other at a program's end, which would never be over. If another
    process's death turns out to be the cause, that is told instead.
    """
    assert _member is not None
    _member.fail(line, status)
    print(f"jaxlm: {line}", file=sys.stderr, flush=True)
    rollcall.leave_at_once(status)
