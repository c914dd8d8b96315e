"""Processes that work on command: a line of JSON in, a line of JSON out. A process that waits for its next command uses
no CPU, so several of them can take turns in one run. Only the standard library: every peer's Python imports this.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def serve(commands: dict[str, Callable[..., Any]]) -> None:
    """In the child: answer until the parent closes the pipe. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        result = commands[request.pop("do")](**request)
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    """In the parent. `env` is added to this process's environment; None removes a variable."""

    def __init__(self, python: str, script: str, arguments: dict, env: dict[str, str | None], threads: int) -> None:
        full = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | env
        command = [python, str(HERE / script), json.dumps(arguments)]
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        pin = ["taskset", "-c", ",".join(map(str, cpus))] if shutil.which("taskset") else []
        self.late = False
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        self.process = subprocess.Popen(
            [*pin, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={k: v for k, v in full.items() if v is not None},
        )

    def ask(self, do: str, *, within: float | None = None, **arguments: Any) -> Any:
        """The answer to one command. A process that takes more than `within` seconds is killed: a TimeoutError."""
        assert self.process.stdin and self.process.stdout
        timer = threading.Timer(within, self._too_late) if within is not None else None
        if timer:
            timer.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; its last words follow
        answer = self.process.stdout.readline()
        if timer:
            timer.cancel()
        if not answer and self.late:
            raise TimeoutError(f"{do} took more than the {within:.0f} s that were left")
        if not answer:
            self.errors.seek(0)
            raise RuntimeError("the process has died:\n" + "".join(self.errors.readlines()[-15:]))
        return json.loads(answer)

    def _too_late(self) -> None:
        self.late = True
        self.process.kill()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def launcher_environment() -> dict[str, str]:
    """The allocator's settings that the command line starts itself with."""
    return dict(runpy.run_path(str(HERE.parent / "jaxlm" / "runtime" / "allocator.py"))["VARIABLES"])


def machine() -> dict[str, Any]:
    """What a figure depends on, without host name or paths."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", info, re.M))
    wide = [f for f in ("avx2", "avx512f", "amx_tile") if f in fields.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", "unknown"),
        "cores": os.cpu_count(),
        "vector_units": wide,
        "memory_gib": round(memory / 2**30, 1),
        "load_before": os.getloadavg()[0],
    }


def save(name: str, result: dict) -> Path:
    """Write `results/NAME.json` in one piece."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".new").rename(path)
    return path


def table(rows: list[list[Any]], header: list[str]) -> str:
    cells = [header, *[[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, width, strict=True)))
        for row in cells
    )
