"""The log is complete after a kill, comparable bit for bit, honest about NaN and about what isn't known."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxlm.runtime.chips import peak_flops
from jaxlm.training import environment
from jaxlm.training.log import RunLog, read_lines
from jaxlm.training.progress import Ema, Meter, Progress, flops_per_token

ROOT = Path(__file__).parents[2]


def without_time(path):
    return [{k: v for k, v in line.items() if k != "time"} for line in read_lines(path)]


def write(folder, steps, **options):
    with RunLog(folder, tensorboard=False, **options) as out:
        for step in steps:
            out.train(step, {"loss": 1 / step, "lr": 1e-3}, {"step_s": 0.1})
            if step % 2 == 0:
                out.valid(step, {"loss": 2 / step}, {})
                out.sample(step, "The ", f"cat {step}")
    return folder


def test_a_line_holds_every_digit_and_the_clock_is_apart(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as out:
        out.train(3, {"loss": jnp.float32(0.1), "lr": 0.1 + 0.2, "skipped": np.int64(2)}, {"step_s": 0.5})
        out.event(3, "saved", kinds=["a"], bytes=7)
    train, event = read_lines(tmp_path / "metrics.jsonl")
    assert train["time"].pop("unix") > 1e9
    assert train == {
        "kind": "train",
        "step": 3,
        "loss": 0.10000000149011612,
        "lr": 0.30000000000000004,
        "skipped": 2,
        "time": {"step_s": 0.5},
    }
    assert (event["kind"], event["name"], event["bytes"]) == ("event", "saved", 7)


def test_numbers_that_json_lacks_are_named(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as out:
        out.train(1, {"a": math.nan, "b": jnp.float32(jnp.inf), "c": -math.inf}, {})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
    assert (line["a"], line["b"], line["c"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(line["a"]))


def test_resumed_log_equals_uninterrupted_log(tmp_path):
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "cut", range(1, 7))  # ran to 6, but the last checkpoint is of step 4
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 7, "lo')
    write(tmp_path / "cut", range(5, 9), resume_step=4)
    assert without_time(tmp_path / "cut" / "metrics.jsonl") == without_time(tmp_path / "whole" / "metrics.jsonl")
    samples = (tmp_path / "whole" / "samples.txt").read_text()
    assert (tmp_path / "cut" / "samples.txt").read_text() == samples
    assert "── step 2 ── 'The '\nThe cat 2\n" in samples
    assert not list((tmp_path / "cut").glob("*.new"))


def test_a_torn_last_line_is_dropped_and_a_broken_one_before_it_is_named(tmp_path):
    path = write(tmp_path, [1, 2]) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "tr')
    write(tmp_path, [3])
    assert [line["step"] for line in read_lines(path)] == [1, 2, 2, 2, 3]
    path.write_bytes(b"x" + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not a line of this log"):
        RunLog(tmp_path, tensorboard=False, resume_step=1)


def test_a_killed_process_has_written_every_line(tmp_path):
    code = (
        "import os, sys\nfrom jaxlm.training.log import RunLog\nout = RunLog(sys.argv[1], tensorboard=False)\n"
        "for step in range(1, 101): out.train(step, {'loss': 1.0}, {})\nos.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 100


def test_other_processes_write_nothing(tmp_path):
    write(tmp_path / "other", [1, 2], enabled=False)
    assert not (tmp_path / "other").exists()


def test_a_metric_cannot_hide_a_key_of_the_line(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as out, pytest.raises(ValueError, match="may not be called 'step'"):
        out.train(1, {"step": 2}, {})


def test_tensorboard_holds_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    with RunLog(tmp_path) as out:
        out.train(1, {"loss": 2.5}, {"tokens_per_s": 10.0, "mfu_causal": None})
        out.sample(1, "The ", "cat")
    (events,) = (tmp_path / "events").iterdir()
    data = events.read_bytes()
    assert all(tag in data for tag in (b"train/loss", b"train/time/tokens_per_s", np.float32(2.5).tobytes(), b"cat"))


def test_tensorboard_takes_numbers_that_are_not_finite(tmp_path):
    pytest.importorskip("tensorboardX")
    with RunLog(tmp_path) as log:
        log.train(1, {"loss": float("nan"), "grad_norm": np.float32(np.inf)}, {"mfu": None})
    assert read_lines(tmp_path / "metrics.jsonl")[0]["loss"] == "NaN"


def test_missing_tensorboard_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r'pip install "jaxlm\[report\]"'):
        RunLog(tmp_path)
    RunLog(tmp_path, tensorboard=False).close()


def test_environment_says_what_ran_and_nothing_private(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(Path.home() / "cache"))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node17.example:1234")
    environment.write_environment(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    found = json.loads(text)
    assert found["versions"]["jax"] and found["devices"] == {
        "platform": "cpu",
        "kind": "cpu",
        "count": 8,
        "local_count": 8,
        "processes": 1,
        "launcher": "",
    }
    assert found["flags"]["JAX_COMPILATION_CACHE_DIR"] == "~/cache"
    assert "xla_force_host_platform_device_count=8" in found["flags"]["XLA_FLAGS"]
    assert found["memory_bytes"] > 1e8 and found["cpu"]["count"] >= 1
    assert str(Path.home()) + "/" not in text and os.uname().nodename not in text and "node17" not in text


def test_commit_of_a_checkout_and_none_of_an_installed_package(tmp_path):
    assert environment._git(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    assert (
        re.fullmatch(r"[0-9a-f]{40}", environment._git(tmp_path)["commit"]) and not environment._git(tmp_path)["dirty"]
    )
    (tmp_path / "file").write_text("2")
    assert environment._git(tmp_path)["dirty"]


def test_flops_by_both_conventions():
    # Llama-2-7B at 4096: 6.61e9 weights that are multiplied (32000 × 4096 of the input embedding are not).
    found = flops_per_token(6_607_343_616, 32, 4096, 4096)
    assert found["causal"] == 6 * 6_607_343_616 + 6 * 32 * 4096 * 4096
    assert found["full"] - found["causal"] == 6 * 32 * 4096 * 4096
    # 11,361 tokens/s on one H100 are published as 49.2 % by the causal convention.
    assert 11_361 * found["causal"] / peak_flops("NVIDIA H100 80GB HBM3") == pytest.approx(0.492, abs=0.001)


def test_unknown_devices_have_no_peak():
    assert peak_flops("cpu") is None
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_meter_tells_speed_waiting_overhead_and_time_left():
    clock = Clock()
    meter = Meter(20, flops={"causal": 10.0, "full": 20.0}, peak=40_000.0, now=clock)
    assert meter.read() == {"elapsed_s": 0.0}
    for i in range(10):
        clock.now += 9.0 if i == 0 else 1.0  # the first step compiles
        meter.update(data_s=0.1, step_s=0.7, tokens=800, positions=1000)  # padding is computed too
        if i == 4:
            clock.now += 50.0  # validation
            meter.pause()
    found = meter.read()
    assert found["tokens_per_s"] == pytest.approx(800.0) and found["step_s"] == pytest.approx(1.0)
    assert found["mfu_causal"] == pytest.approx(0.25) and found["mfu_full"] == pytest.approx(0.5)
    assert found["data_wait"] == pytest.approx(1 / 18) and found["overhead"] == pytest.approx(1 - 8 / 18)
    assert found["eta_s"] == pytest.approx(10.0) and found["elapsed_s"] == pytest.approx(68.0)


def test_no_peak_no_mfu():
    meter = Meter(2, flops={"causal": 1.0, "full": 2.0}, peak=None)
    meter.update(data_s=0.0, step_s=1.0, tokens=1)
    assert meter.read()["mfu_causal"] is None and meter.read()["mfu_full"] is None


def test_average_is_not_pulled_towards_zero_and_nan_does_not_stick():
    ema = Ema(0.9)
    assert ema.update(4.0) == pytest.approx(4.0)
    assert ema.update(4.0) == pytest.approx(4.0)
    assert math.isnan(ema.update(math.nan))
    assert ema.update(2.0) == pytest.approx((0.1 * 2 + 0.09 * 4 + 0.081 * 4) / (1 - 0.9**3))


READING = {"tokens_per_s": 12345.0, "mfu_causal": 0.4215, "mfu_full": 0.4444, "data_wait": 0.013, "eta_s": 3725.0}


def show(terminal, steps, every_s):
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=terminal, width=200, highlight=False)
    with Progress(100, every_s=every_s, console=console) as progress:
        for step in steps:
            progress.update(step, {"loss": 3.0, "grad_norm": 0.5, "lr": 1e-3}, READING)
        progress.say("[valid] loss 2.9")
    return out.getvalue()


def test_progress_without_a_terminal_prints_plain_lines_now_and_then_and_at_the_end():
    assert show(False, [1, 2, 3, 100], every_s=1000.0).splitlines() == [
        "step 1/100  loss 3.0000  grad 0.50  lr 1.00e-03  12.3k tok/s  MFU 42.1% (44.4% full)  data 1%  ETA 1h02m",
        "step 100/100  loss 3.0000  grad 0.50  lr 1.00e-03  12.3k tok/s  MFU 42.1% (44.4% full)  data 1%  ETA 1h02m",
        "[valid] loss 2.9",
    ]
    assert len(show(False, [1, 2, 3], every_s=0.0).splitlines()) == 4


def test_progress_on_a_terminal_keeps_one_line_up_to_date():
    text = show(True, [1, 2, 3], every_s=0.0)
    assert "\x1b[2K" in text and "step 3/100" in text and "[valid] loss 2.9" in text


def test_progress_leaves_out_what_is_not_known():
    out = io.StringIO()
    progress = Progress(10, console=rich.console.Console(file=out, width=200))
    progress.update(1, {"loss": math.nan}, {"mfu_causal": None})
    assert out.getvalue() == "step 1/10  loss nan\n"
