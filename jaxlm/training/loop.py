"""Runs the training loop: step, log, validate, save, and nothing else. It reads in the order it runs."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax
import numpy as np

from jaxlm.core.batch import Batch

Metrics = dict[str, float]


def read_metrics(metrics: Mapping[str, Any]) -> Metrics:
    """Waits for a step's metrics, which are scalars, and returns their numbers."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or Inf, or a batch has nothing to learn from; the message names the step and its
    examples."""


@dataclass(frozen=True)
class Hooks:
    """A Hooks holds the functions that the loop calls. Steps are counted 1, 2, … once they are finished."""

    batches: Callable[[int], Iterator[dict]]
    """Yields host batches from an update (0, 1, …) on."""
    to_device: Callable[[dict], Batch[jax.Array]]
    step: Callable[[Any, Batch[jax.Array]], tuple[Any, dict]]
    indices: Callable[[int], Any]
    """Returns the example indices of an update's batch, for error messages."""
    log: Callable[[int, Metrics, float, float], None]
    """Takes the step, its metrics, the seconds waited for data, and those spent to send the step and wait for it."""
    validate: Callable[[int, Any], Metrics]
    sample: Callable[[int, Any], None]
    save: Callable[[int, Any, Metrics | None, dict], None]
    """Takes the step, the state, the validation metrics of this very step or None, and early stopping's memory."""
    read: Callable[[Mapping[str, Any]], Metrics] = read_metrics
    """Waits for a step's metrics."""
    ended: Callable[[], bool] = lambda: False
    """Returns whether the step just made was the last one, where that is not known before."""


@dataclass(frozen=True)
class Outcome:
    """An Outcome says where and why the loop ended."""

    state: Any
    step: int
    reason: str
    """One of finished, interrupted and stopped early."""
    best: float
    """The lowest validation score."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Notes SIGTERM and Ctrl-C in the list that it yields, for the loop to end in good order; a second one is not
    caught.

    Where there are several processes JAX waits for SIGTERM on each of them, and tells the others: that stays in place.
    """
    noted: list[int] = []
    several_processes = jax.process_count() > 1

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(number, previous[signal.Signals(number)])
        if several_processes:
            os.kill(os.getpid(), signal.SIGTERM)

    caught = (signal.SIGINT,) if several_processes else (signal.SIGTERM, signal.SIGINT)
    previous = {s: signal.signal(s, note) for s in caught}
    try:
        yield noted
    finally:
        for s, handler in previous.items():
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
    """Runs the updates `start` … `steps`. Metrics are read one step late, so the host never waits for the step it just
    sent.

    `best` and `bad` carry early stopping over a restart: the lowest validation score, and validations since then.
    Raises NonFiniteError for what `_check` refuses.
    """
    batches = hooks.batches(start)
    pending: tuple[int, dict, float, float] | None = None
    done, reason = start, "finished"

    def read() -> None:
        """Waits for the pending step's metrics, checks and logs them."""
        nonlocal pending
        if pending is None:
            return
        number, metrics, waited, sending = pending
        began = time.perf_counter()
        values = hooks.read(metrics)
        pending = None
        hooks.log(number, values, waited, sending + time.perf_counter() - began)
        _check(number, values, hooks.indices, stop_on_nonfinite)

    with stop_signals() as signals:
        try:
            for update in range(start, steps):
                began = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - began
                sent = time.perf_counter()
                state, metrics = hooks.step(state, hooks.to_device(batch))
                sending = time.perf_counter() - sent
                read()
                done = update + 1
                pending = (done, metrics, waited, sending)

                last, improved = done == steps or hooks.ended(), False
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
                if last or reason != "finished":
                    break
        finally:
            close = getattr(batches, "close", None)  # a loader has it, a plain iterator doesn't
            if close:
                close()
    return Outcome(state, done, reason, best)


def _asked_to_stop(signals: list[int], done: int) -> bool:
    """Returns whether to stop now.

    Several processes must leave at the same step: when one of them gets SIGTERM, JAX agrees in the background on a step
    that none has passed yet. Asking costs no message.
    """
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
