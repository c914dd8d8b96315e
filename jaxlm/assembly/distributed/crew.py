"""Watches over workers that a coordinator starts on its own machine: those that die or hang are started again."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxlm.core import config

QUICK = 60.0
"""Seconds within which a worker that dies may have no cause but its own start."""
TRIES = 3
"""Quick deaths in a row after which a worker isn't started again; they are counted anew once it has come to the
server."""


class Crew:
    """A Crew is the workers on this machine, w0, w1 …, each a process `jaxlm work`, whose output goes to
    `workers/NAME.log` of the run."""

    def __init__(self, run: config.Run, address: str, count: int) -> None:
        self.run, self.address = run, address
        self.names = [f"w{i}" for i in range(count)]
        self._processes: dict[str, subprocess.Popen] = {}
        self._started: dict[str, float] = {}
        self._quick: dict[str, int] = {}

    def __enter__(self) -> "Crew":
        for name in self.names:
            self._start(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()  # it saves, and ends
        until = time.monotonic() + self.run.distributed.server.grace
        for process in self._processes.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def look(self, status: Mapping[str, Any]) -> None:
        """Starts those again that have died, or that the server has given up while they were running."""
        for name, process in list(self._processes.items()):
            ended = process.poll()
            if ended is None and name in status["members"]:
                self._quick[name] = 0
            given_up = name in status["gone"] and "no sign of life" in status["gone"][name]
            if ended is None and given_up and name not in status["members"] and self._age(name) > QUICK:
                print(f"{name} hangs: it is killed and started again", flush=True)
                process.kill()
                process.wait()
                self._start(name)
            elif ended is not None:
                self._again(name, ended)

    def farewell(self, members: Callable[[], Mapping[str, Any]]) -> None:
        """Waits until all workers have been told that the run is over, or for as long as a round waits for the last."""
        until = time.monotonic() + self.run.distributed.server.grace
        while time.monotonic() < until and members():
            time.sleep(0.2)

    def pids(self) -> dict[str, int]:
        """Returns the process of each worker."""
        return {name: process.pid for name, process in self._processes.items()}

    def _again(self, name: str, status: int) -> None:
        self._quick[name] = self._quick.get(name, 0) + 1 if self._age(name) < QUICK else 0
        if status == 2 or self._quick[name] >= TRIES:
            del self._processes[name]
            print(f"{name} ended with status {status} and is not started again: see {self._log(name)}", flush=True)
            return
        print(f"{name} ended with status {status}: it is started again", flush=True)
        self._start(name)

    def _age(self, name: str) -> float:
        return time.monotonic() - self._started[name]

    def _log(self, name: str) -> Path:
        return self.run.folder / "workers" / f"{name}.log"

    def _start(self, name: str) -> None:
        self._log(name).parent.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "jaxlm", "work", str(self.run.folder), "--address", self.address,
                 "--worker", name]  # fmt: skip
        environment = os.environ | devices(self.names.index(name), len(self.names), os.environ, accelerators())
        with self._log(name).open("ab") as out:
            self._processes[name] = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
        self._started[name] = time.monotonic()
        print(f"{name} is pid {self._processes[name].pid}", flush=True)


def accelerators() -> int:
    """Returns how many NVIDIA GPUs this machine has."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def devices(index: int, count: int, environment: Mapping[str, str], gpus: int) -> dict[str, str]:
    """Returns the variable that gives a worker its share of this machine's GPUs, of those that are visible now; nothing
    where there are fewer GPUs than workers."""
    every = visible(environment, gpus)
    each = len(every) // count
    return {"CUDA_VISIBLE_DEVICES": ",".join(every[index * each : (index + 1) * each])} if each else {}


def visible(environment: Mapping[str, str], gpus: int) -> list[str]:
    """Returns the GPUs of this machine, which has so many, that a process with this environment sees."""
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(gpus)] if shown is None else [word for word in shown.split(",") if word]
