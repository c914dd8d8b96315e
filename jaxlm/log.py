"""What a run says: `metrics.jsonl`, samples, TensorBoard events, the environment, speed and the progress line.

Everything that depends on the clock stands under the key `time` of a line, so two runs are compared bit for bit by
dropping that one key.
"""

import collections
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time as clock
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.live
import rich.text

from jaxlm import processes

PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Variables that change how devices and their network are used; those that name a host or a place are left out.
RECORDED = ("JAX_", "JAXLM_", "XLA_", "LIBTPU_INIT_ARGS", "NCCL_", "TPU_", "MEGASCALE_NUM_SLICES", "CUDA_", "TF_GPU_")
PRIVATE = ("ADDRESS", "HOSTNAME", "NCCL_SOCKET_IFNAME", "_KEY", "TOKEN", "_FILE")
RESERVED = ("kind", "step", "name", "time")


def flops_per_token(matmul_params: int, layers: int, attention_width: int, seq_len: int) -> dict[str, float]:
    """Training FLOPs (forward and backward, nothing recomputed) for one token, by the two conventions in use.

    matmul_params: weights that every token is multiplied with, the output head among them, an embedding that is only
    looked up not; of a mixture of experts those that one token meets. attention_width: heads × size of a head.
    The products of weights cost 6 per weight. Attention costs 12·L·S·d if every pair of positions counts ("full":
    PaLM's appendix B, Levanter, torchtitan, nanoGPT) and half of it if only the pairs of a causal mask count ("causal":
    Megatron, today's MaxText). The same run has a higher MFU by "full": never compare across conventions.
    """
    pairs = layers * seq_len * attention_width
    return {"causal": 6.0 * matmul_params + 6.0 * pairs, "full": 6.0 * matmul_params + 12.0 * pairs}


class RunLog:
    """Writes one JSON object a line, each with one system call, so that a killed process loses at most the last line.

    resume_step: drop everything later than it first. None: append. ended: that step was the last one, so the samples
    and events of the run's end, which follow its checkpoint, are dropped as well. enabled: only on process 0 of a run.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
        ended: bool = False,
        enabled: bool = True,
    ):
        self._lines = self._samples = self._events = None
        if not enabled:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path, samples = folder / "metrics.jsonl", folder / "samples.txt"
        if path.exists():
            lines = read_lines(path)
            if resume_step is not None:
                lines = [line for line in lines if line["step"] <= resume_step]
                if ended:
                    before = lambda x: x["kind"] in ("train", "valid") or x.get("name") == "gain"  # noqa: E731
                    lines = [x for x in lines if x["step"] < resume_step or before(x)]
            _replace(path, "".join(map(_line, lines)))
            _replace(samples, "".join(_sample(x) for x in lines if x["kind"] == "sample"))
        if tensorboard:
            purge = None if resume_step is None else resume_step + 1
            self._events = _tensorboard()(str(folder / "events"), purge_step=purge, flush_secs=10)
        self._lines = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
        self._samples = open(samples, "ab", buffering=0)  # noqa: SIM115

    def train(self, step: int, metrics: Mapping[str, Any], time: Mapping[str, Any]) -> None:
        self._numbers("train", step, metrics, time)

    def valid(self, step: int, metrics: Mapping[str, Any], time: Mapping[str, Any]) -> None:
        self._numbers("valid", step, metrics, time)

    def event(self, step: int, name: str, **info: Any) -> None:
        """Something that happened once; what in it depends on the clock goes into `time={…}`."""
        self._write({"kind": "event", "step": step, "name": name, **info})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """text: what the model wrote after `prompt`."""
        line = {"kind": "sample", "step": step, "prompt": prompt, "text": text}
        self._write(line)
        if self._samples is not None:
            self._samples.write(_sample(line).encode())
        if self._events is not None:
            self._events.add_text(f"sample/{prompt[:40]}", text, step)

    def close(self) -> None:
        for file in (self._lines, self._samples, self._events):
            if file is not None:
                file.close()
        self._lines = self._samples = self._events = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _numbers(self, kind: str, step: int, metrics: Mapping[str, Any], time: Mapping[str, Any]) -> None:
        if bad := [name for name in metrics if name in RESERVED]:
            raise ValueError(f"a metric may not be called {bad[0]!r}: rename it")
        self._write({"kind": kind, "step": step, **metrics, "time": dict(time)})
        if self._events is not None:
            for name, value in [*metrics.items(), *((f"time/{k}", v) for k, v in time.items())]:
                if value is not None:
                    self._events.add_scalar(f"{kind}/{name}", _plain(value), step)

    def _write(self, line: dict[str, Any]) -> None:
        if self._lines is not None:
            stamped = {**line, "time": {**line.get("time", {}), "unix": round(clock.time(), 3)}}
            self._lines.write(_line(stamped).encode())


def read_lines(path: str | os.PathLike) -> list[dict]:
    """The lines of a `metrics.jsonl`. A last line without its end was cut by a kill and is left out; any other fault is
    a ValueError that names the line. Values that JSON has no number for come as "NaN", "Infinity", "-Infinity"."""
    *whole, _ = Path(path).read_bytes().split(b"\n")
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            line["step"], line["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a line of this log: mend or delete it ({error})") from error
        lines.append(line)
    return lines


def _line(line: dict) -> str:
    return json.dumps(_plain(line), allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON's own types. Python writes a float with as many digits as tell it apart from every other float."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()  # a scalar of numpy or JAX; anything larger raises
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _sample(line: dict) -> str:
    return f"── step {line['step']} ── {line['prompt']!r}\n{line['prompt']}{line['text']}\n\n"


def _replace(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process is killed."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _tensorboard() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'TensorBoard events need tensorboardX: pip install "jaxlm[report]", or switch them off'
        ) from error
    return SummaryWriter


def environment() -> dict[str, Any]:
    """What the run ran on, with nothing that names a person, a host or a home folder."""
    devices = jax.devices()
    home = str(Path.home())
    flags = {
        name: value.replace(home, "~") if len(home) > 1 else value
        for name, value in sorted(os.environ.items())
        if name.startswith(RECORDED) and not any(word in name for word in PRIVATE)
    }
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "local_count": jax.local_device_count(),
            "processes": jax.process_count(),
            "launcher": processes.told(),
        },
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flags": flags,
        "git": _git(Path(__file__).parents[1]),
    }


def write_environment(folder: str | os.PathLike, **more: Any) -> None:
    """`more`: what else is to stand there, such as the compiler's options."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _replace(Path(folder) / "environment.json", json.dumps(environment() | more, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _git(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout that this package is run from; None if it was installed or git isn't there."""
    if not (root / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


class Meter:
    """Speed and where the time goes, over a window of steps.

    flops: per token, as from `flops_per_token`. peak: FLOP/s of all devices together, None if unknown.
    """

    def __init__(
        self,
        steps: int,
        *,
        start: int = 0,
        flops: Mapping[str, float] | None = None,
        peak: float | None = None,
        window: int = 50,
        now: Any = clock.perf_counter,
    ):
        self._steps, self._done, self._flops, self._peak, self._now = steps, start, flops or {}, peak, now
        self._window: collections.deque[tuple[float, float, float, int]] = collections.deque(maxlen=window)
        self._begin = self._last = now()

    def update(self, *, data_s: float, step_s: float, tokens: int) -> None:
        """Once for each training step: seconds waited for data, seconds in the step, tokens of all devices in it."""
        now = self._now()
        self._window.append((now - self._last, data_s, step_s, tokens))
        self._last = now
        self._done += 1

    def pause(self) -> None:
        """What happened since the last step (validation, samples) is no loop overhead and no part of the speed."""
        self._last = self._now()

    def read(self) -> dict[str, float | None]:
        """tokens_per_s is the median over the window, so that one slow step (a compilation) doesn't hide the speed."""
        elapsed = self._now() - self._begin
        if not self._window:
            return {"elapsed_s": elapsed}
        wall, data, step, _ = (sum(column) for column in zip(*self._window, strict=True))
        speed = statistics.median(tokens / max(seconds, 1e-9) for seconds, _, _, tokens in self._window)
        typical = statistics.median(seconds for seconds, *_ in self._window)
        mfu = {name: speed * flops / self._peak if self._peak else None for name, flops in self._flops.items()}
        return {
            "tokens_per_s": speed,
            "step_s": typical,
            "data_wait": min(data / max(wall, 1e-9), 1.0),
            "overhead": max(1 - (data + step) / max(wall, 1e-9), 0.0),
            "mfu_causal": mfu.get("causal"),
            "mfu_full": mfu.get("full"),
            "eta_s": typical * max(self._steps - self._done, 0),
            "elapsed_s": elapsed,
        }


class Ema:
    """Exponential moving average without the pull towards its start: m / (1 - βᵗ). A NaN or Inf passes by unmixed."""

    def __init__(self, beta: float = 0.98):
        self._beta, self._mean, self._weight = beta, 0.0, 0.0

    def update(self, value: float) -> float:
        if not math.isfinite(value):
            return value
        self._mean += (1 - self._beta) * (value - self._mean)
        self._weight += (1 - self._beta) * (1 - self._weight)
        return self._mean / self._weight


class Progress:
    """One line that stays up to date on a terminal; elsewhere a line every `every_s` seconds and at the end."""

    def __init__(
        self,
        steps: int,
        *,
        every_s: float = 10.0,
        beta: float = 0.98,
        console: rich.console.Console | None = None,
        enabled: bool = True,
    ):
        self._console = console or rich.console.Console(highlight=False)
        self._steps, self._every_s, self._ema, self._enabled = steps, every_s, Ema(beta), enabled
        self._live: rich.live.Live | None = None
        self._printed = -math.inf
        self._smooth: float | None = None

    def __enter__(self) -> "Progress":
        if self._enabled and self._console.is_terminal:
            self._live = rich.live.Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, metrics: Mapping[str, Any], reading: Mapping[str, Any]) -> None:
        """metrics: loss, grad_norm, lr (any may be missing); reading: of `Meter.read`."""
        if not self._enabled:
            return
        if "loss" in metrics:
            self._smooth = self._ema.update(float(metrics["loss"]))
        line = _progress_line(step, self._steps, self._smooth, metrics, reading)
        if self._live is not None:
            self._live.update(rich.text.Text(line, no_wrap=True, overflow="ellipsis"))
        elif step >= self._steps or clock.monotonic() - self._printed >= self._every_s:
            self._printed = clock.monotonic()
            self.say(line)

    def say(self, line: str) -> None:
        """A line that stays, above the live one."""
        if self._enabled:
            self._console.print(rich.text.Text(line), soft_wrap=True)


def _progress_line(step: int, steps: int, smooth: float | None, metrics: Mapping, reading: Mapping) -> str:
    mfu = reading.get("mfu_causal")
    parts = [
        f"step {step}/{steps}",
        smooth is not None and f"loss {smooth:.4f}",
        "grad_norm" in metrics and f"grad {float(metrics['grad_norm']):.2f}",
        "lr" in metrics and f"lr {float(metrics['lr']):.2e}",
        "tokens_per_s" in reading and f"{_short(reading['tokens_per_s'])} tok/s",
        mfu is not None and f"MFU {mfu:.1%} ({reading['mfu_full']:.1%} full)",
        "data_wait" in reading and f"data {reading['data_wait']:.0%}",
        "eta_s" in reading and f"ETA {_duration(reading['eta_s'])}",
    ]
    return "  ".join(part for part in parts if part)


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
