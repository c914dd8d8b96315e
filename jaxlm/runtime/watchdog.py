"""Where a run is stuck: the stacks of all threads, written when no step has finished for too long."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEAST = 300.0  # seconds that nothing may happen, if nothing else is said


class Watchdog:
    """A thread that is told of every finished step. It writes `stacks-<process>.txt` into the folder once a time stuck.

    seconds: without a step before it does so; 0: ten times the slowest step, three times the longest time between two
    (a validation or a save lies between some), and at least five minutes. first: seconds that compiling took, which
    counts as a step: another shape of batch may have to be compiled later. behind: who holds the others up, in words.
    stuck: called after it, with what was said.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        process: int = 0,
        *,
        seconds: float = 0.0,
        first: float = 0.0,
        behind: Callable[[], str] = str,
        stuck: Callable[[str], Any] = lambda line: None,
    ):
        if seconds < 0:
            raise ValueError(f"train.watchdog: {seconds} s is no time; give 0 for a limit by the steps' own, or inf")
        self.file = Path(folder) / f"stacks-{process}.txt"
        self._seconds, self._slowest, self._longest = seconds, first, 0.0
        self._behind, self._stuck = behind, stuck
        self._last, self._told = time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def limit(self) -> float:
        return self._seconds or max(LEAST, 10 * self._slowest, 3 * self._longest)

    def beat(self, seconds: float) -> None:
        """A step has finished; it took so long."""
        now = time.monotonic()
        if not self._told:  # what it was once stuck for is no measure
            self._slowest, self._longest = max(self._slowest, seconds), max(self._longest, now - self._last)
        self._last, self._told = now, False

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(5)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.limit / 4)):
            waited = time.monotonic() - self._last
            if waited > self.limit and not self._told:
                self._told = True
                self._tell(waited)

    def _tell(self, waited: float) -> None:
        who = self._behind()
        line = f"no step has finished for {waited:.0f} s{f': {who}' if who else ''}; stacks: {self.file}"
        try:
            with open(self.file, "a") as file:
                file.write(f"── {time.strftime('%Y-%m-%d %H:%M:%S')} ── {line}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the disk may be what it is stuck at
            line += f" (not written: {error.strerror})"
        print(f"jaxlm: {line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        self._stuck(line)
