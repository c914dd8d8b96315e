"""The loop: in which order things happen, how it ends, and what it takes up again."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.training import loop
from jaxlm.training.loop import Hooks, NonFiniteError

OFTEN = {"eval_every": 2, "sample_every": 3, "save_every": 4, "patience": 0}


class Recorder:
    """Hooks that write down what happened; the state is the number of updates."""

    def __init__(self, *, valid=lambda step: 1.0 / step, metrics=lambda step: {}, at=None):
        self.events: list = []
        self.valid, self.metrics, self.at = valid, metrics, at or {}
        self.closed = False

    def happened(self, kind: str, step: int) -> None:
        self.events.append((kind, step))
        if (kind, step) in self.at:
            self.at[kind, step]()

    def batches(self, start: int):
        self.iterator = self.count(start)  # kept, so that nothing but the loop can close it
        return self.iterator

    def count(self, start: int):
        try:
            for i in range(start, 1000):
                yield {"update": i}
        finally:
            self.closed = True

    def step(self, state: int, batch: dict):
        assert batch["update"] == state, "a batch was skipped or repeated"
        self.happened("step", state + 1)
        return state + 1, {"loss": 1.0, "finite": 1.0, "grad_norm": 1.0, "weight/tokens": 5.0} | self.metrics(state + 1)

    def validate(self, step: int, state: int) -> dict:
        assert state == step
        self.happened("validate", step)
        return {"score": self.valid(step)}

    def save(self, step, state, validation, memory) -> None:
        assert state == step
        self.saved = (step, validation, memory)
        self.happened("save", step)

    @property
    def hooks(self) -> Hooks:
        return Hooks(
            batches=self.batches,
            to_device=lambda batch: batch,
            step=self.step,
            indices=lambda update: np.arange(update * 4, update * 4 + 4).reshape(2, 2),
            log=lambda step, metrics, data_s, step_s: self.happened("log", step),
            validate=self.validate,
            sample=lambda step, state: self.happened("sample", step),
            save=self.save,
        )

    def run(self, *, start: int = 0, steps: int = 10, **changes) -> loop.Outcome:
        return loop.train(start, self.hooks, start=start, steps=steps, **OFTEN | changes)

    def of(self, kind: str) -> list[int]:
        return [step for k, step in self.events if k == kind]


# --------------------------------------------------------------------------------------------------------------- order


def test_the_best_state_is_saved_when_asked_for():
    scores = {2: 3.0, 4: 1.0, 6: 2.0, 8: 0.5, 10: 0.7}
    r = Recorder(valid=lambda step: scores[step])
    r.run(eval_every=2, save_every=0, save_best=True)
    assert r.of("save") == [2, 4, 8, 10]


def test_each_thing_happens_when_it_is_due():
    r = Recorder()
    end = r.run()
    assert (end.state, end.step, end.reason) == (10, 10, "finished")
    assert r.of("step") == r.of("log") == list(range(1, 11))
    assert r.of("validate") == [2, 4, 6, 8, 10]
    assert r.of("sample") == [3, 6, 9]
    assert r.of("save") == [4, 8, 10]
    assert r.closed


def test_metrics_are_read_one_step_late_but_before_anything_is_decided_by_them():
    r = Recorder()
    r.run(steps=5, eval_every=4, sample_every=0, save_every=0)
    assert r.events == [
        *[("step", 1), ("step", 2), ("log", 1), ("step", 3), ("log", 2), ("step", 4), ("log", 3)],
        *[("log", 4), ("validate", 4), ("step", 5), ("log", 5), ("validate", 5), ("save", 5)],
    ]


@pytest.mark.parametrize("start", [3, 4, 9])
def test_a_continued_run_does_the_rest(start):
    whole, rest = Recorder(), Recorder()
    whole.run()
    rest.run(start=start)
    assert [e for e in whole.events if e[1] > start] == rest.events


def test_nothing_is_left_to_do():
    r = Recorder()
    end = r.run(start=10)
    assert r.events == [] and (end.step, end.reason) == (10, "finished") and r.closed is False


def test_no_validation_but_at_the_end():
    r = Recorder()
    r.run(eval_every=0, save_every=0)
    assert r.of("validate") == r.of("save") == [10]


def test_a_save_gets_the_validation_of_its_own_step_or_none():
    r, got = Recorder(), {}
    r.at = {("save", s): lambda s=s: got.update({s: r.saved[1]}) for s in (3, 6, 9, 10)}
    r.run(save_every=3)
    assert got == {3: None, 6: {"score": 1 / 6}, 9: None, 10: {"score": 0.1}}


# ------------------------------------------------------------------------------------------------------ early stopping


def test_early_stopping_counts_validations_without_improvement():
    losses = {2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5, 10: 1.0}
    r = Recorder(valid=losses.get)
    end = r.run(patience=2)
    assert (end.step, end.reason, end.best) == (8, "stopped early", 2.0)
    assert r.saved == (8, {"score": 2.5}, {"best": 2.0, "bad": 2})
    assert Recorder(valid=losses.get).run(patience=3).reason == "finished"


def test_early_stopping_remembers_over_a_restart():
    losses = {2: 3.0, 4: 2.0, 6: 2.1, 8: 2.5, 10: 1.0}
    first = Recorder(valid=losses.get)
    first.run(steps=6, patience=2)
    memory = first.saved[2]
    assert memory == {"best": 2.0, "bad": 1}
    assert Recorder(valid=losses.get).run(start=6, patience=2, **memory).step == 8
    assert Recorder(valid=losses.get).run(start=6, patience=2).step == 10  # as it would be without its memory


def test_a_validation_that_is_not_a_number_is_no_improvement():
    assert Recorder(valid=lambda step: float("nan")).run(patience=2).step == 4


# ------------------------------------------------------------------------------------------------- numbers gone astray

BAD = {5: {"loss": float("nan"), "finite": 0.0}}


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_examples():
    r = Recorder(metrics=lambda step: BAD.get(step, {}))
    with pytest.raises(NonFiniteError, match=r"step 5: loss nan, .*examples: \[16 17 18 19\].*train\.nonfinite=skip"):
        r.run()
    assert r.of("save") == [4] and 5 in r.of("log") and r.closed


def test_it_is_noticed_before_a_save_or_a_validation_of_that_step():
    r = Recorder(metrics=lambda step: {"finite": 0.0, "loss": float("nan")} if step == 4 else {})
    with pytest.raises(NonFiniteError, match="step 4"):
        r.run()
    assert r.of("validate") == [2] and r.of("save") == []


def test_or_the_run_goes_on_without_that_update():
    r = Recorder(metrics=lambda step: BAD.get(step, {}))
    assert r.run(stop_on_nonfinite=False).step == 10
    assert r.of("log") == list(range(1, 11))


@pytest.mark.parametrize("stop", [True, False])
def test_a_batch_without_a_single_target_is_always_an_error(stop):
    r = Recorder(metrics=lambda step: {"weight/tokens": 0.0, "finite": 0.0} if step == 3 else {})
    with pytest.raises(
        NonFiniteError, match=r"step 3: the batch has not a single target \(tokens\); .*\[ ?8  9 10 11\]"
    ):
        r.run(stop_on_nonfinite=stop)


def test_many_examples_are_shortened():
    r = Recorder(metrics=lambda step: BAD.get(step, {}))
    hooks = r.hooks.__class__(**{**vars(r.hooks), "indices": lambda update: np.arange(1000)})
    with pytest.raises(NonFiniteError) as error:
        loop.train(0, hooks, start=0, steps=10, **OFTEN)
    assert "0   1   2   3 ... 996" in str(error.value) and len(str(error.value)) < 400


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_save(number):
    before = signal.getsignal(number)
    r = Recorder(at={("step", 6): lambda: os.kill(os.getpid(), number)})
    end = r.run(save_every=0)
    assert (end.step, end.reason, end.state) == (6, "interrupted", 6)
    assert r.of("save") == [6] and r.of("log") == list(range(1, 7)) and r.closed
    assert signal.getsignal(number) is before


def test_a_second_signal_is_not_caught():
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        Recorder(at={("step", 3): twice}).run()


def test_an_interrupted_run_and_its_rest_are_the_whole():
    first = Recorder(at={("step", 5): lambda: os.kill(os.getpid(), signal.SIGTERM)})
    end, rest, whole = first.run(), Recorder(), Recorder()
    rest.run(start=end.step)
    whole.run()
    for kind in ("step", "log", "validate", "sample"):
        assert first.of(kind) + rest.of(kind) == whole.of(kind)


def test_handlers_come_back_after_a_failure():
    before = signal.getsignal(signal.SIGTERM)
    r = Recorder(at={("step", 2): lambda: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        r.run()
    assert signal.getsignal(signal.SIGTERM) is before and r.closed


def test_a_failing_loader_is_not_swallowed():
    def batches(start):
        yield {"update": 0}
        raise OSError("the disk is gone")

    r = Recorder()
    r.batches = batches
    with pytest.raises(OSError, match="the disk is gone"):
        r.run()


# --------------------------------------------------------------------------------------------------------- real arrays


def test_the_loop_moves_nothing_between_host_and_device_but_by_name(monkeypatch):
    """With implicit transfers forbidden: batches are put, metrics are fetched once a step, and nothing else crosses."""
    f = jax.jit(lambda s, b: (s + b["x"].sum(), {"loss": s, "finite": s * 0 + 1, "grad_norm": s}), donate_argnums=0)
    logged, fetched, device_get = [], [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(1) or device_get(x))
    hooks = Hooks(
        batches=lambda start: iter([{"x": np.full(3, i, np.float32)} for i in range(start, 5)]),
        to_device=jax.device_put,
        step=f,
        indices=lambda update: update,
        log=lambda step, metrics, data_s, step_s: logged.append((step, metrics["loss"], type(metrics["loss"]))),
        validate=lambda step, state: {"score": 1.0},
        sample=lambda step, state: None,
        save=lambda step, state, validation, memory: None,
    )
    state = jax.device_put(jnp.zeros(()))
    with jax.transfer_guard("disallow"):
        end = loop.train(state, hooks, start=0, steps=5, **OFTEN)
    assert len(fetched) == 5
    assert logged == [(1, 0.0, float), (2, 0.0, float), (3, 3.0, float), (4, 9.0, float), (5, 18.0, float)]
    assert f._cache_size() == 1
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
        loop.train(end.state, Hooks(**vars(hooks) | {"to_device": dict}), start=0, steps=1, **OFTEN)


def test_seconds_waited_for_data_are_measured():
    r, waited = Recorder(), []

    def batches(start):
        for i in range(3):
            time.sleep(0.05)
            yield {"update": i}

    r.batches = batches
    hooks = Hooks(**{**vars(r.hooks), "log": lambda step, metrics, data_s, step_s: waited.append(data_s)})
    loop.train(0, hooks, start=0, steps=3, **OFTEN)
    assert len(waited) == 3 and min(waited) >= 0.049
