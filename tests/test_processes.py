"""The same program on two processes of four devices each, started on loopback, equals one process of eight devices."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm.log import read_lines

ROOT = Path(__file__).parents[1]
OVERRIDES = ["--train.steps", "4", "--train.eval-every", "0", "--train.eval-batches", "2", "--train.save-every", "2",
             "--train.log-every", "1", "--train.prompts", "--optim.warmup", "1",
             "--execution.scan", "True"]  # fmt: skip


def start(family: str, out: Path, mesh: list[str], devices: int, **env: str) -> subprocess.Popen:
    text = out.parent / "text"
    text.mkdir(exist_ok=True)
    for i in range(8):
        (text / f"{i}.txt").write_text("".join(f"file {i} line {j} of several words\n" for j in range(60)))
    flags = f"--xla_force_host_platform_device_count={devices}"
    data = ["--data.train", str(text), "--data.holdout", "0.3", "--data.cache", str(out.parent / "cache")]
    command = [sys.executable, "-m", "jaxlm", "train", f"tiny_{family}", "--out", str(out), *OVERRIDES, *mesh, *data]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def losses(folder: Path) -> np.ndarray:
    return np.array(
        [line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] in ("train", "valid")]
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("llama", ["--mesh.fsdp", "2", "--mesh.tensor", "2"]),
        pytest.param("bert", ["--mesh.fsdp", "2", "--mesh.context", "2"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(family: str, mesh: list[str], tmp_path: Path) -> None:
    finish(start(family, tmp_path / "one", mesh, 8))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = [
        start(family, tmp_path / "two", mesh, 4, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2",
              JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]  # fmt: skip
    for process in both:
        finish(process)
    one, two = losses(tmp_path / "one" / f"tiny_{family}"), losses(tmp_path / "two" / f"tiny_{family}")
    assert len(one) == 4 + 2
    np.testing.assert_allclose(two, one, rtol=2e-5)
    # what two processes saved, one process of one device reads
    process = subprocess.run(
        [sys.executable, "-m", "jaxlm", "eval", str(tmp_path / "two" / f"tiny_{family}"), "--batches", "2", "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1])["loss"] == pytest.approx(one[-1], rel=1e-4)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        ("2", 2, r"train.steps is 5 on process 0 \(.*\) and 4 on process 1 \("),
        pytest.param("3", 1, r"1 of 3 processes did not come within 5 s: 2; here: 0", marks=pytest.mark.slow),
    ],
)
def test_processes_that_differ_or_miss_one_end_before_they_begin(number, status, words, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    told = dict(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES=number,
                JAXLM_START_SECONDS="5" if number == "3" else "100")  # fmt: skip
    steps = ["5", "4"] if number == "2" else ["4", "4"]
    both = [start("llama", tmp_path / "two", ["--train.steps", n], 1, JAX_PROCESS_ID=str(i), **told)
            for i, n in enumerate(steps)]  # fmt: skip
    for process in both:
        out, _ = process.communicate(timeout=100)
        assert process.returncode == status, out
        assert re.search(words, out) and "Traceback" not in out, out
    assert not (tmp_path / "two").exists()
