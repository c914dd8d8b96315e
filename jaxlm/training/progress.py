"""Measures a training run's throughput and FLOPs, and shows the progress line."""

import collections
import math
import statistics
import time as clock
from collections.abc import Mapping
from typing import Any

import rich.console
import rich.live
import rich.text


def flops_per_token(
    matmul_params: int, layers: int, attention_width: int, seq_len: int, *, backward: bool = True
) -> dict[str, float]:
    """Returns the training FLOPs (forward and backward, nothing recomputed) of one token, by the two conventions in
    use.

    `matmul_params` counts the weights that a token is multiplied with: the output head, but no embedding that is only
    looked up, and of a mixture of experts those that one token meets. `attention_width` is heads × size of a head. The
    products of weights cost 6 per weight. Attention costs 12·L·S·d if every pair of positions counts ("full": PaLM's
    appendix B, Levanter, torchtitan, nanoGPT) and half of it if only the pairs of a causal mask count ("causal":
    Megatron, today's MaxText). The same run has a higher MFU by "full": never compare across conventions.

    Where weights are frozen, `matmul_params` counts two thirds of those that gradients pass through, and one third of
    the others; `backward` says whether any pass through attention.
    """
    pairs = layers * seq_len * attention_width * (1 if backward else 1 / 3)
    return {"causal": 6.0 * matmul_params + 6.0 * pairs, "full": 6.0 * matmul_params + 12.0 * pairs}


class Meter:
    """A Meter measures speed, and where the time goes, over a window of steps.

    `flops` are those of a token, as from `flops_per_token`. `peak` is the FLOP/s of all devices together, None if
    unknown.
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
        self._window: collections.deque[tuple[float, float, float, int, int]] = collections.deque(maxlen=window)
        self._begin = self._last = now()

    def update(self, *, data_s: float, step_s: float, tokens: int, positions: int | None = None) -> None:
        """Records a training step: seconds waited for data, seconds in the step, tokens of all devices in it, and the
        positions they stand in, which are computed whether they are padding or not; None: there is no padding."""
        now = self._now()
        self._window.append((now - self._last, data_s, step_s, tokens, tokens if positions is None else positions))
        self._last = now
        self._done += 1

    def pause(self) -> None:
        """Leaves out what happened since the last step (validation, samples): it is no loop overhead and no part of the
        speed."""
        self._last = self._now()

    def read(self) -> dict[str, float | None]:
        """Returns the figures of the window by name.

        `tokens_per_s` is the median over the window, so that one slow step (a compilation) doesn't hide the speed.
        """
        elapsed = self._now() - self._begin
        if not self._window:
            return {"elapsed_s": elapsed}
        wall, data, step, *_ = (sum(column) for column in zip(*self._window, strict=True))
        speed, computed = (
            statistics.median(one[i] / max(one[0], 1e-9) for one in self._window) for i in (3, 4)
        )  # tokens, positions
        typical = statistics.median(seconds for seconds, *_ in self._window)
        mfu = {name: computed * flops / self._peak if self._peak else None for name, flops in self._flops.items()}
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
    """An Ema is an exponential moving average without the pull towards its start: m / (1 - βᵗ). A NaN or Inf passes by
    unmixed."""

    def __init__(self, beta: float = 0.98):
        self._beta, self._mean, self._weight = beta, 0.0, 0.0

    def update(self, value: float) -> float:
        """Adds a value and returns the average."""
        if not math.isfinite(value):
            return value
        self._mean += (1 - self._beta) * (value - self._mean)
        self._weight += (1 - self._beta) * (1 - self._weight)
        return self._mean / self._weight


class Progress:
    """A Progress is one line that stays up to date on a terminal; elsewhere it prints every `every_s` seconds and at
    the end."""

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
        """Shows a step: `metrics` has loss, grad_norm and lr (any may be missing); `reading` comes from
        `Meter.read`."""
        if not self._enabled:
            return
        if "loss" in metrics:
            self._smooth = self._ema.update(float(metrics["loss"]))
        line = _progress_line(step, self._steps, self._smooth, metrics, reading)
        if self._live is not None:
            self._live.update(rich.text.Text(line, no_wrap=True, overflow="ellipsis"))
        elif step == self._steps or clock.monotonic() - self._printed >= self._every_s:
            self._printed = clock.monotonic()
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line that stays, above the live one."""
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
