"""The loop: step, log, validate, save; nothing else. It reads in the order it runs."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax
import numpy as np

from jaxlm.core.batch import Batch

Metrics = dict[str, float]


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or Inf, or a batch has nothing to learn from; says at which step, on which examples."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls, in words of the step just finished (1, 2, …)."""

    batches: Callable[[int], Iterator[dict]]
    """Host batches from an update (0, 1, …) on."""
    to_device: Callable[[dict], Batch[jax.Array]]
    step: Callable[[Any, Batch[jax.Array]], tuple[Any, dict]]
    indices: Callable[[int], Any]
    """Example indices of an update's batch, for error messages."""
    log: Callable[[int, Metrics, float, float], None]
    """(step, metrics, seconds waited for data, seconds in the step: sending it and waiting for it)."""
    validate: Callable[[int, Any], Metrics]
    sample: Callable[[int, Any], None]
    save: Callable[[int, Any, Metrics | None, dict], None]
    """(step, state, validation metrics of this very step or None, early stopping's memory)."""


@dataclass(frozen=True)
class Outcome:
    state: Any
    step: int
    reason: str
    """finished, interrupted or stopped early."""
    best: float


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are noted in this list, for the loop to end in good order; a second one is not caught.

    Where there are several processes JAX waits for SIGTERM on each of them, and tells the others: that stays in place.
    """
    got: list[int] = []
    several = jax.process_count() > 1

    def note(number: int, frame: FrameType | None) -> None:
        got.append(number)
        signal.signal(number, old[signal.Signals(number)])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    caught = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    old = {s: signal.signal(s, note) for s in caught}
    try:
        yield got
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def train(
    state: Any,
    hooks: Hooks,
    *,
    start: int,
    steps: int,
    eval_every: int,
    sample_every: int,
    save_every: int,
    patience: int,
    best: float = float("inf"),
    bad: int = 0,
    stop_on_nonfinite: bool = True,
    save_best: bool = False,
) -> Outcome:
    """Updates `start` … `steps`. Metrics are read one step late, so the host never waits for the step it just sent.

    `best` and `bad` carry early stopping over a restart: the lowest validation score, and validations since then.
    """
    batches = hooks.batches(start)
    pending: tuple[int, dict, float, float] | None = None
    done, reason = start, "finished"

    def read() -> None:
        """Wait for the pending step's metrics, check and log them."""
        nonlocal pending
        if pending is None:
            return
        number, metrics, waited, sending = pending
        asked = time.perf_counter()
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        pending = None
        hooks.log(number, values, waited, sending + time.perf_counter() - asked)
        _check(number, values, hooks.indices, stop_on_nonfinite)

    with stop_signals() as signals:
        try:
            for update in range(start, steps):
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                sent = time.perf_counter()
                state, metrics = hooks.step(state, hooks.to_device(batch))
                sending = time.perf_counter() - sent
                read()
                done = update + 1
                pending = (done, metrics, waited, sending)

                last, improved = done == steps, False
                validation = None
                if last or (eval_every and done % eval_every == 0):
                    read()
                    validation = hooks.validate(done, state)
                    improved = validation["score"] < best
                    best, bad = (validation["score"], 0) if improved else (best, bad + 1)
                    if patience and bad >= patience:
                        reason = "stopped early"
                if sample_every and done % sample_every == 0 and not last:
                    read()
                    hooks.sample(done, state)
                if _asked_to_stop(signals, done):
                    reason = "interrupted"
                if last or reason != "finished" or (save_every and done % save_every == 0) or (save_best and improved):
                    read()
                    hooks.save(done, state, validation, {"best": best, "bad": bad})
                if reason != "finished":
                    break
        finally:
            close = getattr(batches, "close", None)
            if close:
                close()
    return Outcome(state, done, reason, best)


def _asked_to_stop(signals: list[int], done: int) -> bool:
    """Whether to stop now. Several processes must leave at the same step: when one of them gets SIGTERM, JAX agrees on
    one that none has passed yet, in the background. Asking costs no message."""
    if jax.process_count() == 1:
        return bool(signals)
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(done)


def _check(number: int, values: Metrics, indices: Callable[[int], Any], stop: bool) -> None:
    """The step left the weights alone if its loss or gradient was not finite, so nothing is lost by stopping here."""
    shown = np.array2string(np.ravel(indices(number - 1)), threshold=16, edgeitems=4)
    for name, value in values.items():
        if name.startswith("weight/") and value == 0:
            raise NonFiniteError(
                f"step {number}: the batch has not a single target ({name.removeprefix('weight/')}); "
                f"its examples: {shown}; check the data, or seq_len and the objective"
            )
    if values["finite"] == 0 and stop:
        raise NonFiniteError(
            f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}; the update was left out; "
            f"examples: {shown}; lower optim.lr, or set train.nonfinite=skip to leave such updates out and go on"
        )
