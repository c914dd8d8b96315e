"""Several real processes on loopback: they train, are killed, stopped, told to stop, and go on in other numbers.

    python tests/system/processes.py [--folder DIR]

The losses of a run that went through 4, 2 and 1 processes must be those of an undisturbed run of one process. Every
process has to end by itself in bounded time, and say which other one was the reason. Exit status 1 at any difference.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
BOUND = 60.0  # seconds in which the others must have ended
DEVICES = 4
STEPS = 24


def command(folder: Path, name: str, *more: str) -> list[str]:
    words = ["train", str(ROOT / "configs/tiny_llama.py"), "--name", name, "--out", folder / "runs",
             "--data.train", folder / "text", "--data.holdout", "0.3", "--data.cache", folder / "cache",
             "--train.steps", STEPS, "--train.eval-every", "0", "--train.eval-batches", "2", "--train.save-every", "4",
             "--train.log-every", "1", "--train.prompts", "--optim.warmup", "1", "--execution.scan", "True",
             "--mesh.fsdp", "2", *more]  # fmt: skip
    return [str(word) for word in words]


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT),
                         "JAXLM": f"{sys.executable} -m jaxlm", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # fmt: skip


class Group:
    """N processes by launch/local.sh, whose output goes to a file."""

    def __init__(self, folder: Path, count: int, name: str, *more: str, log: str = ""):
        self.count, self.log = count, folder / f"{log or name}-{count}.log"
        self.metrics = folder / "runs" / name / "metrics.jsonl"
        self.started = time.monotonic()
        with self.log.open("w") as out:
            words = ["bash", str(ROOT / "launch/local.sh"), str(count), *command(folder, name, *more)]
            self.process = subprocess.Popen(words, env=environment(DEVICES // count), stdout=out, stderr=out)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def pid(self, index: int) -> int:
        found = re.search(rf"^process {index} is pid (\d+)", self.said, re.MULTILINE)
        assert found, self.said
        return int(found[1])

    def until_step(self, step: int) -> None:
        while not (self.metrics.exists() and max((x["step"] for x in lines(self.metrics)), default=0) >= step):
            assert self.process.poll() is None, f"ended before step {step}:\n{self.said}"
            assert time.monotonic() - self.started < 900, f"never came to step {step}:\n{self.said}"
            time.sleep(0.05)

    def wait(self, seconds: float = 900.0) -> float:
        """Seconds until all have ended."""
        since = time.monotonic()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for index in range(self.count):
                os.kill(self.pid(index), signal.SIGKILL)
            raise AssertionError(f"not ended after {seconds} s:\n{self.said}") from None
        return time.monotonic() - since


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def losses(folder: Path, name: str) -> dict[tuple[str, int], float]:
    found = [x for x in lines(folder / "runs" / name / "metrics.jsonl") if x["kind"] in ("train", "valid")]
    assert len(found) == STEPS + 2, f"{name}: {len(found)} lines"
    return {(x["kind"], x["step"]): x["loss"] for x in found}


def same(folder: Path, name: str, other: str) -> str:
    a, b = losses(folder, name), losses(folder, other)
    assert a.keys() == b.keys()
    worst = max(abs(a[k] - b[k]) / abs(b[k]) for k in b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=5e-5)
    return f"{len(b)} losses of {name} equal those of {other}, largest relative difference {worst:.1e}"


def ok(line: str) -> None:
    print(f"ok: {line}", flush=True)


def uninterrupted(folder: Path) -> None:
    words = [sys.executable, "-m", "jaxlm", *command(folder, "alone")]
    done = subprocess.run(words, env=environment(DEVICES), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for count in (2, 4):
        group = Group(folder, count, f"whole{count}")
        group.wait()
        assert group.process.returncode == 0, group.said
        assert f"{count}, by launch/local.sh" in group.said
        ok(f"{count} processes: " + same(folder, f"whole{count}", "alone"))


def disturbed(folder: Path) -> None:
    host = socket.gethostname()
    group = Group(folder, 4, "moved", log="killed")
    group.until_step(6)
    os.kill(group.pid(2), signal.SIGKILL)
    took = group.wait(BOUND)
    named = group.said.count(f"jaxlm: process 2 ({host}) has died; go on with: jaxlm train")
    assert named == 3, group.said
    ok(f"SIGKILL to process 2 of 4: the other 3 name it and end within {took:.1f} s")

    group = Group(folder, 2, "moved", log="stopped")
    group.until_step(13)
    os.kill(group.pid(1), signal.SIGTERM)
    took = group.wait(BOUND)
    assert group.process.returncode == 1, group.said
    step = int(re.search(r"interrupted after step (\d+); saved. Go on with: jaxlm train", group.said)[1])
    assert step < STEPS and (folder / f"runs/moved/checkpoints/checkpoint-{step}").is_dir()
    ok(f"SIGTERM to process 1 of 2: all saved step {step} and ended within {took:.1f} s")

    words = [sys.executable, "-m", "jaxlm", *command(folder, "moved")]
    done = subprocess.run(words, env=environment(DEVICES), capture_output=True, text=True)
    assert done.returncode == 0 and f"after step {step}" in done.stdout, done.stdout + done.stderr
    ok("4, then 2, then 1 process: " + same(folder, "moved", "alone"))


def hanging(folder: Path) -> None:
    more = ["--train.watchdog", "4", "--train.stuck", "exit", "--train.steps", "100000", "--train.save-every", "0"]
    group = Group(folder, 2, "stuck", *more)
    group.until_step(6)
    os.kill(group.pid(1), signal.SIGSTOP)
    try:
        while "no step has finished" not in group.said:
            assert group.process.poll() is None and time.monotonic() - group.started < 400, group.said
            time.sleep(0.1)
        time.sleep(5)
        stacks = folder / "runs/stuck/stacks-0.txt"
        assert "loop.py" in stacks.read_text(), stacks.read_text()
    finally:
        os.kill(group.pid(1), signal.SIGCONT)
    group.wait(BOUND)
    assert group.process.returncode != 0
    line = re.search(r"no step has finished for .*", group.said)[0]
    ok(f"SIGSTOP to process 1 of 2: {line.replace(str(folder), '…')}")


def refused(folder: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def run(*each: tuple[int, int, list[str]]) -> list[tuple[int, str, float]]:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "jaxlm", *command(folder, "refused", *more)], stderr=subprocess.PIPE, text=True,
                env=environment(1) | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
                                      "JAX_PROCESS_ID": str(index), "JAXLM_START_SECONDS": "20"},
            )
            for index, count, more in each
        ]  # fmt: skip
        out = []
        for process in started:
            since = time.monotonic()
            said = process.communicate(timeout=120)[1]
            out.append((process.returncode, said.strip().splitlines()[-1], time.monotonic() - since))
        return out

    for status, said, _ in run((0, 3, []), (2, 3, [])):
        assert status == 1 and "1 of 3 processes did not come within 20 s: 1; here: 0 (" in said, said
    ok(said)
    [(status, said, _)] = run((1, 2, []))
    assert status == 1 and f"process 0 is not to be reached at 127.0.0.1:{port}" in said, said
    ok(said)
    for status, said, _ in run((0, 2, []), (1, 2, ["--optim.lr", "0.1"])):
        assert status == 2 and "optim.lr is 0.003 on process 0" in said and "0.1 on process 1" in said, said
    ok(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="keep everything there (default: a temporary one)")
    parser.add_argument("--only", choices=("uninterrupted", "disturbed", "hanging", "refused"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).absolute()
        (folder / "text").mkdir(parents=True, exist_ok=True)
        for i in range(8):
            text = "".join(f"file {i} line {j} of several words\n" for j in range(60))
            (folder / "text" / f"{i}.txt").write_text(text)
        for part in (refused, uninterrupted, disturbed, hanging):
            if args.only in (None, part.__name__):
                part(folder)
    print("PASSED")


if __name__ == "__main__":
    main()
