"""Makes a worker's local steps: takes up global weights, trains on a data shard, and gives the weights back as one
vector."""

import itertools
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from jaxlm.assembly import corpus, moments, open_model
from jaxlm.assembly import program as programs
from jaxlm.assembly.distributed import terms
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.program import HOURS
from jaxlm.core import config, spec, tree
from jaxlm.data.loader import Loader
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.runtime import mesh, processes
from jaxlm.training.distributed import simulate, vector
from jaxlm.training.distributed.book import Answer
from jaxlm.training.step import State


class LocalSteps:
    """A LocalSteps holds the functions of one worker, whatever shard it trains on.

    `run` is the run of all workers and `p` the program of one; a shard has the same rows of every batch as the worker
    of that number would have in one program.
    """

    def __init__(self, run: config.Run, p: programs.Program, data: corpus.Corpus) -> None:
        self.run, self.p, self.data = run, p, data
        trained, _ = tree.partition(p.specs, p.optimizer.trainable)
        self.shapes: dict[str, tuple[int, ...]] = {
            path: s.shape for path, s in tree.flatten(trained, spec.is_spec).items()
        }
        self.places = vector.places(self.shapes)
        self._compiled: dict[Any, Any] = {}
        self._step = p.train_step()

    @property
    def count(self) -> int:
        """Returns how many numbers are trained."""
        return max((last for _, last in self.places.values()), default=0)

    # ---- weights

    def vector(self, state: State) -> np.ndarray:
        """Returns the trained weights in the host's memory, on every process of the worker."""
        leaves = tree.flatten(state.params)
        if jax.process_count() > 1:
            leaves = {path: multihost_utils.process_allgather(x, tiled=True) for path, x in leaves.items()}
        return vector.to_vector(leaves, self.places)

    def take_up(self, state: State, clock: int, weights_N: np.ndarray | None) -> State:
        """Returns a state whose trained weights are the global ones and whose schedules stand at `clock`; what the
        optimizer remembers stays. Process 0 of the worker has the weights, the others give None."""

        def placed(path: str, old: jax.Array) -> jax.Array:
            first, last = self.places[path]
            if weights_N is None:
                whole = np.zeros(self.shapes[path], np.float32)
            else:
                whole = np.asarray(weights_N[first:last]).reshape(self.shapes[path])
            if jax.process_count() > 1:
                whole = multihost_utils.broadcast_one_to_all(whole)
            return jax.make_array_from_callback(whole.shape, old.sharding, lambda i: whole[i].astype(old.dtype))

        params = tree.map_named(placed, state.params)

        def at_clock(x: Any) -> Any:
            value = np.full(x.shape, clock, x.dtype)
            return jax.make_array_from_callback(value.shape, x.sharding, lambda i: value[i])

        is_clock = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
        opt = jax.tree.map(
            lambda x: x._replace(count=at_clock(x.count)) if is_clock(x) else x, state.opt, is_leaf=is_clock
        )
        return state.replace(params=params, opt=opt, step=at_clock(state.step))

    # ---- data

    def loader(self, shard: int) -> tuple[Loader, list[int] | None]:
        """Returns the loader of a shard's rows of every batch, and which of them this process makes."""
        rows = self.p.rows(self.p.new_rows)
        own = range(self.p.new_rows) if rows is None else rows
        first = shard * self.p.new_rows
        return corpus.training_loader(self.run, self.p.objective, self.data, [first + row for row in own]), rows

    def batches(self, shard: int, position: int) -> Generator[dict]:
        """Yields the host batches of a shard from a position on."""
        yield from self.loader(shard)[0].iterate(position)

    def to_device(self, batch: dict) -> DeviceBatch:
        """Puts a batch of a shard onto the devices."""
        return self.p.to_device(batch, self.p.rows(self.p.new_rows))

    # ---- steps

    def compiled(self, state: State, batch: DeviceBatch) -> Any:
        """Returns the compiled step for batches of such shapes: `(state, batch, shard) → (state, metrics)`."""
        leaves: dict[str, Any] = dict(batch)
        shapes = tuple((name, leaf.shape) for name, leaf in sorted(leaves.items()))
        if shapes not in self._compiled:
            self._compiled[shapes] = self._step.lower(state, batch, np.int32(0)).compile()
            processes.barrier("compile the step", HOURS)
        return self._compiled[shapes]

    def step(self, state: State, batch: DeviceBatch, shard: int) -> tuple[State, dict[str, jax.Array]]:
        """Makes one local step, with the dropout of a shard; the old state is given up."""
        return self.compiled(state, batch)(state, batch, np.int32(shard))


def open_steps(run: config.Run, own: config.Run, start: StartModel) -> LocalSteps:
    """Returns the local steps of a worker whose own run is `own`."""
    tokens = open_model.load_tokenizer(run, start)
    p = programs.program(own, tokens, open_model.template_of(run, start))
    parts: list[corpus.Part] = ["train"]
    return LocalSteps(run, p, corpus.corpus(run.data, p.objective, parts))


def simulated(run: config.Run, start: StartModel) -> tuple[np.ndarray, simulate.Train]:
    """Returns the first global weights of a run and the function that trains for `simulate`: each worker by its name
    has its own optimizer state, as a job of its own would."""
    terms.check(run)
    steps = open_steps(run, terms.worker_run(run, "simulated"), start)
    states: dict[str, State] = {}
    with mesh.on_mesh(steps.p.mesh):
        first = moments.first_state(steps.p, start)
    weights = steps.vector(first)

    def train(name: str, work: Answer, weights_N: np.ndarray) -> tuple[np.ndarray, float]:
        with mesh.on_mesh(steps.p.mesh):
            state = states.pop(name, None)
            state = moments.first_state(steps.p, start) if state is None else state
            state = steps.take_up(state, work.clock, weights_N)
            tokens = 0.0
            for batch in itertools.islice(steps.batches(work.shard, work.position), work.steps):
                state, metrics = steps.step(state, steps.to_device(batch), work.shard)
                tokens += float(metrics.get("tokens", 0.0))
            states[name] = state
            return steps.vector(state), tokens

    return weights, train
