"""The watchdog says where a run is stuck: it writes the stacks of all threads if no step finishes for too long."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIN_LIMIT = 300.0  # seconds without a step that are always allowed, unless a limit is given


class Watchdog:
    """A thread that is told of every finished step, and writes `stacks-<process>.txt` into the folder if none comes.

    It writes once each time that the run is stuck. seconds: the time without a step before it does so; 0: ten times the
    slowest step, three times the longest time between two (some have a validation or a save between them), and at
    least five minutes. compile_seconds: counts as a step, for another shape of batch may have to be compiled later.
    describe_stragglers: returns who holds the others up, in words. on_stuck: called afterwards with the message.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        process: int = 0,
        *,
        seconds: float = 0.0,
        compile_seconds: float = 0.0,
        describe_stragglers: Callable[[], str] = str,
        on_stuck: Callable[[str], Any] = lambda line: None,
    ):
        if seconds < 0:
            raise ValueError(f"train.watchdog: {seconds} s is no time; give 0 for a limit by the steps' own, or inf")
        self.file = Path(folder) / f"stacks-{process}.txt"
        self._seconds, self._slowest, self._longest = seconds, compile_seconds, 0.0
        self._describe_stragglers, self._on_stuck = describe_stragglers, on_stuck
        self._last, self._reported = time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def limit(self) -> float:
        """Returns how many seconds without a step are allowed now."""
        return self._seconds or max(MIN_LIMIT, 10 * self._slowest, 3 * self._longest)

    def beat(self, seconds: float) -> None:
        """Notes that a step has finished, which took `seconds`."""
        now = time.monotonic()
        if not self._reported:  # time spent stuck must not raise the limit
            self._slowest, self._longest = max(self._slowest, seconds), max(self._longest, now - self._last)
        self._last, self._reported = now, False

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
            if waited > self.limit and not self._reported:
                self._reported = True
                self._report(waited)

    def _report(self, waited: float) -> None:
        who = self._describe_stragglers()
        line = f"no step has finished for {waited:.0f} s{f': {who}' if who else ''}; stacks: {self.file}"
        try:
            with open(self.file, "a") as file:
                file.write(f"── {time.strftime('%Y-%m-%d %H:%M:%S')} ── {line}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the disk may be what the run is stuck at
            line += f" (not written: {error.strerror})"
        print(f"jaxlm: {line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        self._on_stuck(line)
