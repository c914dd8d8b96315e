"""A sandbox runs programs that a model wrote so that they can do little harm.

Each runs in a process of its own that is new to everything: `python -I` in an empty folder that is removed afterwards,
without environment, in new namespaces of the network (without a single interface), of processes (all of which end with
it) and of shared memory. Before the program begins (see `sandbox_child`), the process gives up its capabilities, bounds
its memory, processor time, files and processes, and asks the kernel to refuse it: to write outside its folder, to read
anything but that and Python's own files, to execute files (Landlock); new processes, sockets and changes of modes
(seccomp). Python's own hooks refuse the same once more. When time is up all of it is killed.

What it does not keep apart: the kernel itself and the processor's caches are shared, so a flaw in the kernel is a way
out; names, sizes and times of files can be seen (not what is in them); the program can fill its folder with many files
of bounded size until its time is up, and can use a processor and its memory so long; files below Python's own folders
and /usr can be read. A program can also lie: it shares a process with the tests that judge it. Run what you distrust
more than a language model in a virtual machine.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CHILD = Path(__file__).with_name("sandbox_child.py")
READABLE = sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr", "/lib", "/lib64"})
APART = ("--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
FLAG = "--weak-sandbox"


class Verdict(NamedTuple):
    """A verdict says whether a program passed and, if not, what ended it (`why`).

    `missing` lists what the machine could not shut in.
    """

    passed: bool
    why: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sandbox:
    """A sandbox bounds each program's time, memory (bytes of addresses), bytes of a file, and processes.

    `apart` runs it in namespaces of its own.
    """

    seconds: float = 5.0
    memory: int = 1 << 30
    file_bytes: int = 1 << 20
    processes: int = 64
    apart: bool = True

    def run(self, program: str) -> Verdict:
        """Runs a program to its end or until its time is up."""
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
            request = dict(program=program, token=token, folder=folder, readable=READABLE,
                           bounds=[self.memory, int(self.seconds) + 1, self.file_bytes, self.processes])  # fmt: skip
            command = [sys.executable, "-I", "-B", "-X", "utf8", str(CHILD)]
            if self.apart:
                command = [shutil.which("unshare") or "unshare", *APART, *command]
            with tempfile.TemporaryFile() as out:
                ended = self._ended(command, json.dumps(request).encode(), folder, out)
                out.seek(0)
                answer = _read(out.read(self.file_bytes), token)
        if ended == "time":
            return Verdict(False, f"not done after {self.seconds:g} s")
        if answer is None:
            return Verdict(False, f"died without an answer ({ended})")
        return Verdict(answer["error"] is None, answer["error"] or "", tuple(answer["missing"]))

    def _ended(self, command: list[str], request: bytes, folder: str, out: object) -> str:
        """Runs the child; returns `time`, or its status and the last line of what the kernel's tools complained of."""
        pipes = dict(stdin=subprocess.PIPE, stdout=out, stderr=subprocess.PIPE)
        child = subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **pipes)  # type: ignore[call-overload]
        try:
            errors = child.communicate(request, timeout=self.seconds)[1]
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return "time"
        lines = errors.decode(errors="replace").strip().splitlines()
        return ": ".join([f"status {child.returncode}", *lines[-1:]])


def _read(output: bytes, token: str) -> dict | None:
    try:
        answer = json.loads(output)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and answer.get("token") == token else None


def opened(weak: bool = False, **bounds: float) -> tuple[Sandbox, list[str]]:
    """Returns (a sandbox, what this machine lacks for it).

    Raises a ValueError where it lacks anything, unless `weak` accepts that, and where no program can be run at all.
    """
    box = Sandbox(**bounds)  # type: ignore[arg-type]
    if box.seconds <= 0 or box.memory < 128 << 20:
        raise ValueError("code: a program needs time and memory; give `seconds` above 0 and `memory` 128 or more")
    lacking = []
    try:
        trial = Sandbox(seconds=20).run("pass")
        why = "" if trial.passed else trial.why
    except OSError as error:
        why = f"unshare: {error.strerror}"
    if why:
        lacking.append(f"no namespaces of its own, so no cut from the network ({why})")
        box = Sandbox(**bounds, apart=False)  # type: ignore[arg-type]
        trial = Sandbox(seconds=20, apart=False).run("pass")
        if not trial.passed:
            raise ValueError(f"code: no Python could be started for the programs: {trial.why}")
    lacking += trial.missing
    if lacking and not weak:
        raise ValueError(
            f"code: programs can't be shut in on this machine: {'; '.join(lacking)}. Use a Linux machine that allows "
            f"it, or accept that with {FLAG}"
        )
    return box, lacking
