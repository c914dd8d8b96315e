"""This script is the inside of the sandbox: it gives up what it can, then runs a program that nobody has read.

`sandbox` starts it as `python -I sandbox_child.py`; it needs the standard library alone. It reads a JSON object from
stdin and writes one to what was stdout, with the token that it was given, once the program came to its end.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
# From linux/landlock.h: numbers of its calls, all rights over files by the version of it, a rule's rights to read.
CREATE, ADD, RESTRICT = 444, 445, 446
RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
READ, READ_FILE, READ_WRITE = 0x4 | 0x8, 0x4, 0x4 | 0x2
# By machine: (how the kernel names it, clone, calls that are refused). These are fork, vfork, socket, socketpair,
# ptrace, mount, unshare, setns, bpf, io_uring_setup, keys, shared memory, and changes of modes, owners, times and
# attributes, which Landlock leaves alone.
CALLS = {
    "x86_64": (0xC000003E, 56, (57, 58, 41, 53, 101, 165, 272, 308, 321, 425, 248, 249, 250, 29, 90, 91, 268, 452, 92,
                                93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199)),
    "aarch64": (0xC00000B7, 220, (198, 199, 117, 40, 97, 268, 280, 425, 217, 218, 219, 194, 52, 53, 452, 54, 55, 88, 5,
                                  6, 7, 14, 15, 16)),
}  # fmt: skip
CLONE3, THREAD = 435, 0x10000
EVENTS = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "ctypes.")


def bounds(memory: int, seconds: int, file_bytes: int, processes: int) -> None:
    """Sets the kernel's limits of this process's resources."""
    for name, limit in (
        ("AS", memory), ("CPU", seconds), ("FSIZE", file_bytes), ("NPROC", processes), ("NOFILE", 64), ("CORE", 0),
    ):  # fmt: skip
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        with contextlib.suppress(ValueError, OSError):  # macOS has some of these by name alone
            resource.setrlimit(number, (limit if hard < 0 else min(limit, hard),) * 2)


def files(folder: str, readable: list[str]) -> str | None:
    """Allows writing in `folder` alone, reading there and in `readable`, and executing nothing.

    Returns None, or why the kernel can't do so.
    """
    version = LIBC.syscall(CREATE, None, ctypes.c_size_t(0), 1) if sys.platform == "linux" else -1
    if version < 1:
        return "this kernel has no Landlock"
    every = RIGHTS[min(version, 5)]
    net, scope = 3 if version >= 4 else 0, 3 if version >= 6 else 0
    attributes = struct.pack("QQQ", every, net, scope)
    rules = LIBC.syscall(CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    devices = [("/dev/null", READ_WRITE), ("/dev/zero", READ_FILE), ("/dev/urandom", READ_FILE)]
    for path, rights in [(folder, every & ~1), *((path, READ) for path in readable), *devices]:
        if os.path.exists(path):
            at = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights &= every if os.path.isdir(path) else READ_WRITE
            LIBC.syscall(ADD, rules, 1, struct.pack("=Qi", rights, at), 0)
            os.close(at)
    return None if LIBC.syscall(RESTRICT, rules, 0) == 0 else f"Landlock refused: {os.strerror(ctypes.get_errno())}"


def calls() -> str | None:
    """Refuses new processes, sockets and changes of modes or owners, by a filter of system calls.

    Returns None, or why the kernel can't do so.
    """
    if sys.platform != "linux" or platform.machine() not in CALLS:
        return f"no filter of system calls is known for {sys.platform} on {platform.machine()}"
    machine, clone, refused = CALLS[platform.machine()]
    no, absent, yes = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x7FFF0000
    load, equal, least, has, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    code += [(least, 0, 1, 0x40000000), (answer, 0, 0, no)]  # another numbering of the same calls
    for number in refused:
        code += [(equal, 0, 1, number), (answer, 0, 0, no)]
    code += [(equal, 0, 1, CLONE3), (answer, 0, 0, absent)]  # its flags can't be seen; libraries go on with clone
    code += [(equal, 0, 3, clone), (load, 0, 0, 16), (has, 1, 0, THREAD), (answer, 0, 0, no), (answer, 0, 0, yes)]
    packed = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    if LIBC.prctl(22, 2, program, 0, 0) != 0:
        return f"the filter of system calls was refused: {os.strerror(ctypes.get_errno())}"
    return None


def powers() -> None:
    """Gives up all capabilities, so that none can be had again."""
    if sys.platform == "linux":
        LIBC.prctl(38, 1, 0, 0, 0)
        LIBC.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


def watch() -> None:
    """Refuses the same once more where Python is asked for it: all there is where the kernel has no such filters."""

    def refuse(event: str, args: Any) -> None:
        if event.startswith(EVENTS):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(refuse)


def main() -> None:
    """Runs the program of the request on stdin and writes how it ended."""
    request = json.loads(sys.stdin.read())
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    powers()
    bounds(*request["bounds"])
    missing = [why for why in (files(request["folder"], request["readable"]), calls()) if why]
    watch()
    error = None
    try:
        exec(compile(request["program"], "program", "exec"), {"__name__": "program"})
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"[:300]
    os.write(out, json.dumps(dict(token=request["token"], error=error, missing=missing)).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
