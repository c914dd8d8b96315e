"""Starts the processes of a sweep's trials, each a `jaxlm train` of a run directory, one at a time in each."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO

from jaxlm.assembly.distributed import crew
from jaxlm.core import plugins
from jaxlm.core.sweep import Settings
from jaxlm.runtime import processes

GRACE = 300.0
"""Seconds in which a process that is asked to stop saves a checkpoint, before it is killed."""
LOCK = "lock"
STOPPED = "interrupted after step"
"""How a run begins to say that it was stopped and saved."""


def environments(settings: Settings, environment: Mapping[str, str], gpus: int | None = None) -> list[dict[str, str]]:
    """Returns the variables that each of the trials that run at once is given, besides those of this process.

    ValueError: there are too few places for them.
    """
    count = settings.parallel
    if settings.devices:
        if len(settings.devices) < count:
            raise ValueError(f"devices: names {len(settings.devices)} places, and {count} trials run at once; name "
                             f"{count}, or lower `parallel`")  # fmt: skip
        return [dict([place.split("=", 1)]) if "=" in place else {"CUDA_VISIBLE_DEVICES": place}
                for place in settings.devices]  # fmt: skip
    if settings.launcher:
        return [{} for _ in range(count)]
    gpus = crew.accelerators() if gpus is None else gpus
    shares = [crew.devices(i, count, environment, gpus) for i in range(count)]
    if count > 1 and crew.visible(environment, gpus) and not all(shares):
        raise ValueError(f"parallel: {count} trials at once have no GPU each; lower it, or say in `devices` who shares")
    return shares


def held(path: Path) -> IO[bytes] | None:
    """Opens a file and locks it, as long as it is open here or in a process that was given it; None: another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


class Process:
    """A Process trains a run directory, and writes what it prints to a file beside it.

    It stops with a checkpoint when it is told to, and when the process that started it is gone. It holds the lock of
    its trial, which `lock` is, until its end.
    """

    def __init__(self, run: Path, lock: IO[bytes], launcher: str, variables: Mapping[str, str]) -> None:
        self.log = run.with_suffix(".log")
        words = [*shlex.split(launcher), sys.executable, "-m", "jaxlm", "train", str(run)]
        alone = {} if launcher else {"JAXLM_DISTRIBUTED": "0"}
        names = {plugins.VARIABLE: ",".join(plugins.loaded)} if plugins.loaded else {}
        environment = os.environ | alone | names | dict(variables) | {processes.STOPS_WITH_INPUT: "1"}
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                words, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=out, pass_fds=(lock.fileno(),),
                start_new_session=True,
            )  # fmt: skip
        self._asked: float | None = None

    def poll(self) -> int | None:
        """Returns the exit status; None: it runs. One that was told to stop long ago is killed."""
        if self._asked is not None and time.monotonic() - self._asked > GRACE:
            self._process.kill()
        return self._process.poll()

    def stop(self) -> None:
        """Tells the process to save and to end, once."""
        if self._asked is None and self._process.poll() is None:
            self._asked = time.monotonic()
            self._process.send_signal(signal.SIGTERM)

    def last_line(self) -> str:
        """Returns what the process said last: its error, if it told one."""
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines() if line.strip()]
        told = [line for line in lines[-50:] if line.startswith(("jaxlm: ", STOPPED))]
        return (told or lines or [""])[-1].removeprefix("jaxlm: ")

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        while self.poll() is None:
            time.sleep(0.05)
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Notes SIGTERM and Ctrl-C in the list that it yields; a second one of a kind is not caught."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    previous = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
