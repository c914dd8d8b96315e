"""Programs that a model wrote, run so that they can do little harm.

Each runs in a process of its own that is new to everything: `python -I` in an empty folder that is removed afterwards,
without environment, in new namespaces of the network (without a single interface), of processes (all of which end with
it) and of shared memory. Before the program begins (see `guard`), the process gives up its capabilities, bounds its
memory, processor time, files and processes, and asks the kernel to refuse it: to write outside its folder, to read
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

GUARD = Path(__file__).with_name("sandbox_child.py")
READABLE = sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr", "/lib", "/lib64"})
APART = ("--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
FLAG = "--weak-sandbox"


class Verdict(NamedTuple):
    passed: bool
    why: str
    """Empty, or what ended the program."""
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sandbox:
    seconds: float = 5.0
    memory: int = 1 << 30
    """Of addresses, in bytes."""
    file_bytes: int = 1 << 20
    processes: int = 64
    apart: bool = True
    """In namespaces of its own."""

    def run(self, program: str) -> Verdict:
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
            told = dict(program=program, token=token, folder=folder, readable=READABLE,
                        bounds=[self.memory, int(self.seconds) + 1, self.file_bytes, self.processes])  # fmt: skip
            command = [sys.executable, "-I", "-B", "-X", "utf8", str(GUARD)]
            if self.apart:
                command = [shutil.which("unshare") or "unshare", *APART, *command]
            with tempfile.TemporaryFile() as out:
                ended = self._ended(command, json.dumps(told).encode(), folder, out)
                out.seek(0)
                found = _read(out.read(self.file_bytes), token)
        if ended == "time":
            return Verdict(False, f"not done after {self.seconds:g} s")
        if found is None:
            return Verdict(False, f"died without an answer ({ended})")
        return Verdict(found["error"] is None, found["error"] or "", tuple(found["missing"]))

    def _ended(self, command: list[str], told: bytes, folder: str, out: object) -> str:
        """How it ended: `time`, or its status and the last line of what the kernel's tools complained of."""
        pipes = dict(stdin=subprocess.PIPE, stdout=out, stderr=subprocess.PIPE)
        child = subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **pipes)  # type: ignore[call-overload]
        try:
            said = child.communicate(told, timeout=self.seconds)[1]
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return "time"
        lines = said.decode(errors="replace").strip().splitlines()
        return ": ".join([f"status {child.returncode}", *lines[-1:]])


def _read(answer: bytes, token: str) -> dict | None:
    try:
        found = json.loads(answer)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("token") == token else None


def opened(weak: bool = False, **bounds: float) -> tuple[Sandbox, list[str]]:
    """(a sandbox, what this machine lacks for it). Anything that it lacks is refused but where `weak` allows it."""
    box = Sandbox(**bounds)  # type: ignore[arg-type]
    if box.seconds <= 0 or box.memory < 128 << 20:
        raise ValueError("--code: a program needs time and memory; give --seconds above 0 and --memory 128 or more")
    lacking = []
    try:
        tried = Sandbox(seconds=20).run("pass")
        why = "" if tried.passed else tried.why
    except OSError as error:
        why = f"unshare: {error.strerror}"
    if why:
        lacking.append(f"no namespaces of its own, so no cut from the network ({why})")
        box = Sandbox(**bounds, apart=False)  # type: ignore[arg-type]
        tried = Sandbox(seconds=20, apart=False).run("pass")
        if not tried.passed:
            raise ValueError(f"--code: no Python could be started for the programs: {tried.why}")
    lacking += tried.missing
    if lacking and not weak:
        raise ValueError(
            f"--code: programs can't be shut in on this machine: {'; '.join(lacking)}. Use a Linux machine that allows "
            f"it, or accept that with {FLAG}"
        )
    return box, lacking
