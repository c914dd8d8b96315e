"""A worker is a whole training job, which goes through the same loop as `jaxlm train`: every so many steps it gives its
delta to a server, and takes up the global weights."""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.assembly import corpus, open_model, run_directory, training_hooks, training_run
from jaxlm.assembly import program as programs
from jaxlm.assembly.distributed import terms
from jaxlm.assembly.distributed.local_steps import LocalSteps
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.program import HOURS
from jaxlm.core import config, config_io
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.runtime import mesh, processes
from jaxlm.training import loop
from jaxlm.training.distributed import vector
from jaxlm.training.distributed.book import Answer
from jaxlm.training.environment import write_environment
from jaxlm.training.log import RunLog
from jaxlm.training.progress import Progress
from jaxlm.training.step import State

ERROR = "error.npy"
"""The file of a worker's directory that holds what it keeps of the errors of compressed deltas."""


class Link(Protocol):
    """A Link is a worker's way to its server. Its answers are `work`, with the global weights, or `end`; every wait has
    a bound."""

    def begin(self) -> tuple[Answer, np.ndarray | None]:
        """Joins, and waits for work."""

    def exchange(
        self, packed: vector.Packed, *, steps: int, tokens: float, seconds: float, loss: float
    ) -> tuple[Answer, np.ndarray | None]:
        """Pushes a delta from the version of the last answer, and waits for work."""

    def beat(self) -> None:
        """Gives a sign of life."""

    def leave(self) -> None:
        """Says that the worker ends."""


class Job:
    """A Job holds what the loop's hooks of one worker share: what it was told to do, and what it has done of it."""

    def __init__(self, steps: LocalSteps, link: Link | None, error: np.ndarray | None) -> None:
        self.steps, self.link, self.error = steps, link, error
        self.note: Callable[[float], None] = lambda seconds: None
        """Takes how long each exchange took, waiting included."""
        self.work = Answer("end")
        self.start: np.ndarray | None = None
        self.done = 0
        """Local steps since the last exchange."""
        self.taken = 0
        """Batches taken since the last answer."""
        self._began = 0.0
        self._noted: list[dict[str, jax.Array]] = []

    def begin(self, state: State) -> State:
        """Joins the server, and returns the state with which to begin."""
        return self._take_up(state, self._agreed(lambda link: link.begin()))

    def step(self, state: State, batch: DeviceBatch) -> tuple[State, dict[str, jax.Array]]:
        """Makes a local step, and after the last one of a round the exchange."""
        state, metrics = self.steps.step(state, batch, self.work.shard)
        self._noted.append(metrics)
        self.done += 1
        if self.done == self.work.steps:
            return self._exchange(state), metrics
        if self.link is not None:
            self.link.beat()
        return state, metrics

    def batches(self, start: int) -> Iterator[dict]:
        """Yields the batches of what the worker is told to do, whatever shard that is of."""
        while True:
            shard, at = self.work.shard, self.work.position
            with contextlib.closing(self.steps.batches(shard, at)) as source:
                while self.work.shard == shard and self.work.position + self.taken == at:
                    at += 1
                    self.taken += 1
                    yield next(source)

    def ended(self) -> bool:
        """Returns whether the server has said that the run is over."""
        return self.work.do == "end"

    def _exchange(self, state: State) -> State:
        now = self.steps.vector(state)
        noted = jax.device_get(self._noted)
        losses = [float(m["loss"]) for m in noted if m["finite"]]
        tokens = float(sum(m.get("tokens", 0) for m in noted))
        seconds, loss = time.monotonic() - self._began, float(np.mean(losses)) if losses else math.nan
        c = self.steps.run.distributed

        def push(link: Link) -> tuple[Answer, np.ndarray | None]:
            assert self.start is not None
            packed = vector.pack(c.compress, np.subtract(self.start, now, out=now), self.error, c.error_decay)
            return link.exchange(packed, steps=self.done, tokens=tokens, seconds=seconds, loss=loss)

        pushed = time.monotonic()
        told = self._agreed(push)
        self.note(time.monotonic() - pushed)
        return self._take_up(state, told)

    def _take_up(self, state: State, told: tuple[Answer, np.ndarray | None]) -> State:
        self.work, self.start = told
        self.done, self.taken, self._noted = 0, 0, []
        if self.work.do == "work":
            state = self.steps.take_up(state, self.work.clock, self.start)
        self._began = time.monotonic()
        return state

    def _agreed(self, ask: Callable[[Link], tuple[Answer, np.ndarray | None]]) -> tuple[Answer, np.ndarray | None]:
        """Returns what process 0 is told, on all processes of the worker; the weights on process 0 alone."""
        told: tuple[Answer, np.ndarray | None] = (Answer("end"), None)
        if self.link is not None:
            told = ask(self.link)
        if jax.process_count() == 1:
            return told
        processes.barrier("the exchange", HOURS + 2 * self.steps.run.distributed.server.wait)
        answer = told[0]
        numbers = np.array([answer.do == "work", *answer[1:-1]], np.int64)
        does, *others = multihost_utils.broadcast_one_to_all(numbers.astype(np.int32)).tolist()
        return Answer("work" if does else "end", *others), told[1]


def work(run: config.Run, start: StartModel, name: str, connect: Callable[[dict[str, Any], int], Link]) -> int:
    """Trains as the worker `name` of a run until its server says that the run is over; `connect` gives the way to the
    server to process 0, from what must be agreed in and how many numbers are trained. Returns the exit status, as
    `training_run.train` does."""
    terms.check(run)
    own = terms.worker_run(run, terms.check_name(name))
    with run_directory.removed_if_refused(own.folder) as begins:
        return _work(run, own, start, connect, begins)


def _work(
    run: config.Run, own: config.Run, start: StartModel, connect: Callable[[dict[str, Any], int], Link],
    begins: Callable[[], None],
) -> int:  # fmt: skip
    main = jax.process_index() == 0
    if main:
        run_directory.claim(own)
    processes.barrier("the run directory", HOURS)
    tokens = open_model.load_tokenizer(run, start)
    p = programs.program(own, tokens, open_model.template_of(run, start))
    parts: list[corpus.Part] = ["train"]
    steps = LocalSteps(run, p, corpus.corpus(run.data, p.objective, parts))
    processes.barrier("the data", 6 * HOURS)
    if main:
        open_model.save_description(own, tokens, start)
        write_environment(own.folder, compiler_options=p.compiler_options)
    processes.barrier("the first files", HOURS)
    with mesh.on_mesh(p.mesh), Checkpoints(own.folder / "checkpoints", keep=run.train.keep) as checkpoints:
        state, meta = training_run.first_state(p, checkpoints, start)
        error = _error(own, steps.count) if main and run.distributed.compress != "none" else None
        began = time.perf_counter()
        steps.compiled(state, steps.to_device(next(steps.batches(0, 0))))
        took = time.perf_counter() - began
        job = Job(steps, connect(terms.of(run, p), steps.count) if main else None, error)
        state = job.begin(state)
        begins()
        with RunLog(own.folder, resume_step=meta.get("step", -1), enabled=main) as log:
            end = _loop(job, state, meta, checkpoints, log, took)
        if job.link is not None:
            job.link.leave()
    processes.barrier("the end", HOURS)
    if main:
        print(f"{own.name}: {end.reason} after {end.step} local steps {job.work.why}".rstrip())
    return 1 if end.reason == "interrupted" else 0


def _loop(
    job: Job, state: State, meta: dict, checkpoints: Checkpoints, log: RunLog, compile_seconds: float
) -> loop.Outcome:
    """Makes local steps until the server ends the run, or a signal the worker."""
    p, c, first = job.steps.p, job.steps.p.run.train, int(meta.get("step", 0))
    if job.ended():
        return loop.Outcome(state, first, "finished", math.inf)
    meter, watch = training_run.speed_meter(p, first), training_run.stuck_watchdog(p.run, compile_seconds)
    with Progress(c.steps, enabled=jax.process_index() == 0) as progress, watch:
        loader, _ = job.steps.loader(job.work.shard)
        keeper = training_hooks.Keeper(
            p, loader, checkpoints, log, meter, watch, progress, lambda step, state: ({}, {}), lambda *_: None
        )
        keeper.tokens = int(meta.get("tokens", 0))
        made = itertools.count(first + 1)

        def step(state: State, batch: DeviceBatch) -> tuple[State, dict[str, jax.Array]]:
            number = next(made)
            job.note = lambda seconds: log.event(
                number, "exchange", version=job.work.version, time={"seconds": seconds}
            )
            return job.step(state, batch)

        def save(step: int, state: State, validation: Any, stopping: dict) -> None:
            held = {"step": step, "tokens": keeper.tokens, "config": config_io.to_dict(p.run)}
            checkpoints.save(step, run_directory.saved(state, p.adapter), held)
            if job.error is not None:
                new = p.run.folder / f"new-{ERROR}"
                np.save(new, job.error)
                new.replace(p.run.folder / ERROR)
            meter.pause()

        hooks = loop.Hooks(
            batches=job.batches,
            to_device=job.steps.to_device,
            step=training_hooks.announcing(step, first),
            indices=lambda update: np.array([job.work.shard, job.work.position + job.taken]),
            log=keeper.log_step,
            validate=lambda step, state: {"score": math.inf},
            sample=lambda step, state: None,
            save=save,
            ended=job.ended,
        )
        return loop.train(
            state, hooks, start=first, steps=sys.maxsize, eval_every=0, sample_every=0, save_every=c.save_every,
            patience=0, stop_on_nonfinite=c.nonfinite == "stop",
        )  # fmt: skip


def _error(own: config.Run, count: int) -> np.ndarray:
    """Returns what the worker keeps of the errors of compressed deltas, which its directory holds once it has saved."""
    file = own.folder / ERROR
    kept = np.load(file) if file.is_file() else np.zeros(count, np.float32)
    if kept.shape != (count,):
        raise ValueError(f"{file}: is of {kept.size} numbers and the run trains {count}; delete {own.folder}")
    return kept
