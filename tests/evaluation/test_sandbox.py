"""What a program that nobody has read can't do, by each layer alone and all together; and programs that pass."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.evaluation import sandbox, sandbox_child
from jaxlm.evaluation.sandbox import Sandbox, Verdict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux")


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return sandbox.opened(seconds=20)[0]
    except ValueError as error:
        pytest.skip(f"programs can't be shut in here: {error}")


def test_a_program_that_ends_well_passes_and_one_that_does_not_says_why(box):
    assert box.run("import random, collections, hashlib\nassert sum(range(5)) == 10") == Verdict(True, "")
    assert box.run("assert 1 == 2, 'no'") == Verdict(False, "AssertionError: no")
    assert "SyntaxError" in box.run("def f(:").why
    assert "RecursionError" in box.run("def f(): return f()\nf()").why


@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "import os; os._exit(0)", "exit()"])
def test_leaving_before_the_tests_is_no_pass(box, end):
    assert not box.run(f"{end}\nassert False").passed


@pytest.mark.parametrize("endless", ["while True: pass", "import time; time.sleep(99)"])
def test_time_runs_out(endless):
    started = time.monotonic()
    found = Sandbox(seconds=1.5, apart=False).run(endless)
    assert found.why == "not done after 1.5 s" and time.monotonic() - started < 10


def test_memory_and_files_are_bounded(box):
    assert "MemoryError" in box.run("rows = []\nwhile True: rows.append(bytearray(1 << 24))").why
    assert "File too large" in box.run("open('big', 'wb').write(bytes(1 << 24))").why


def test_files_outside_its_folder_are_out_of_reach(box, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("secret")
    for does in ("open({0}).read()", "open({0}, 'w')", "os.remove({0})", "os.rename({0}, 'here')", "os.chmod({0}, 0)",
                 "os.listdir(os.path.dirname({0}))", "os.mkdir({0} + '2')", "os.utime({0}, (0, 0))"):  # fmt: skip
        found = box.run(f"import os\n{does.format(repr(str(mine)))}")
        assert "PermissionError" in found.why, does
    assert mine.read_text() == "secret" and [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert "PermissionError" in box.run(f"open('/proc/{os.getpid()}/environ').read()").why
    assert box.run("import os\nopen('a', 'w').write('x')\nassert os.listdir() == ['a']").passed


def test_it_has_no_environment_of_ours(box, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert box.run("import os\nassert not set(os.environ) - {'LC_CTYPE'}, os.environ").passed


def test_network_and_processes_are_refused(box):
    assert "PermissionError" in box.run("import socket\nsocket.create_connection(('127.0.0.1', 9))").why
    assert "PermissionError" in box.run("import os\nwhile True: os.fork()").why
    assert "PermissionError" in box.run("import subprocess\nsubprocess.run(['true'])").why
    assert "PermissionError" in box.run(f"import os\nos.kill({os.getpid()}, 9)").why
    assert box.run("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").passed


def alone(code: str, apart: bool = False) -> subprocess.CompletedProcess:
    """In a process that has only what `code` takes from `sandbox_child`."""
    head = f"import sys, os\nsys.path.insert(0, {str(Path(sandbox_child.__file__).parent)!r})\nimport sandbox_child\n"
    command = [sys.executable, "-I", "-c", head + code]
    return subprocess.run((["unshare", *sandbox.APART] if apart else []) + command, capture_output=True, text=True)


def test_the_filter_of_system_calls_holds_without_pythons_hooks(box):
    found = alone("""
import ctypes, socket, threading
sandbox_child.powers()
assert sandbox_child.calls() is None
for attempt in (os.fork, socket.socket, lambda: os.posix_spawn('/bin/true', ['true'], {}), lambda: os.chmod('.', 0)):
    try:
        attempt()
    except OSError as error:
        assert error.errno == 1, error
    else:
        raise SystemExit('went through')
libc = ctypes.CDLL(None, use_errno=True)
assert libc.fork() == -1 and libc.socket(2, 1, 0) == -1 and libc.unshare(0x10000000) == -1
t = threading.Thread(target=print, args=('a thread is none of these',)); t.start(); t.join()
""")
    assert found.returncode == 0 and "a thread" in found.stdout, found.stderr


def test_the_namespaces_hold_without_the_filter(box):
    found = alone("""
import socket, ctypes
try:
    socket.create_connection(('1.1.1.1', 53), 2)
except OSError as error:
    print(error.errno)
assert [name for _, name in socket.if_nameindex()] == ['lo'] and os.getpid() == 1
sandbox_child.powers()
assert 'CapEff:\\t0000000000000000' in open('/proc/self/status').read()
""", apart=True)  # fmt: skip
    assert found.stdout.strip() == "101" and found.returncode == 0, found.stderr


def test_a_fork_bomb_ends_with_its_namespace(box, tmp_path):
    """Were both the filter and the hooks gone: all die with the one that `unshare` started."""
    mark = f"bomb{os.getpid()}"
    code = f"import os, time\nfor _ in range(4): os.fork()\nargs = {mark!r}\ntime.sleep(60)"
    child = subprocess.Popen(["unshare", *sandbox.APART, sys.executable, "-I", "-c", code], start_new_session=True)

    def alive() -> int:
        seen = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen += mark.encode() in path.read_bytes()
            except OSError:
                continue
        return seen

    until = time.monotonic() + 20
    while alive() < 17 and time.monotonic() < until:
        time.sleep(0.05)
    assert alive() >= 17
    os.killpg(child.pid, 9)
    child.wait()
    while alive() and time.monotonic() < until + 10:
        time.sleep(0.05)
    assert alive() == 0


def test_a_machine_that_cannot_shut_programs_in_is_refused_unless_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/nowhere/unshare")
    with pytest.raises(ValueError, match=r"no cut from the network .*accept that with --weak-sandbox"):
        sandbox.opened()
    weak, lacking = sandbox.opened(weak=True)
    assert not weak.apart and len(lacking) >= 1
    assert weak.run("pass").passed and not weak.run("import socket\nsocket.socket()").passed
