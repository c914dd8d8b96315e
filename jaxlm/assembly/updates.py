"""Makes a run's updates one after the other: a step of all devices, or steps of workers that train apart and what is
exchanged between them."""

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.assembly import program as programs
from jaxlm.assembly.program import HOURS
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.runtime import processes
from jaxlm.training.distributed import replicas


class Updates:
    """An Updates makes the updates after `start`, in order: `(state, batch) → (state, metrics)`, state donated.

    A program is compiled once for each shape of a batch, and for each group of fragments that travels with a step.
    """

    def __init__(self, p: programs.Program, start: int) -> None:
        self._p, self._done = p, start
        self._steps: dict[tuple[int, ...], tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self._exchanges: dict[tuple[tuple[int, ...], tuple[int, ...]], Any] = {}

    def compiled(self, state: Any, batch: DeviceBatch) -> Any:
        """Returns the compiled program of the next step, without running it."""
        return self._step(self._due(self._done + 1).send)[1](state, batch)

    def __call__(self, state: Any, batch: DeviceBatch) -> tuple[Any, dict[str, jax.Array]]:
        """Makes the next update."""
        self._done += 1
        due = self._due(self._done)
        state, metrics = self._step(due.send)[0](state, batch)
        if due.exchange or due.take:
            state = self._exchange(due.exchange, due.take, state)(state)
        return state, metrics

    def _due(self, update: int) -> replicas.Due:
        return replicas.due(self._p.run.distributed, update, self._p.run.train.steps)

    def _step(self, send: tuple[int, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if send not in self._steps:
            self._steps[send] = programs.once_a_shape(self._p.train_step(send), "compile the step")
        return self._steps[send]

    def _exchange(self, exchanged: tuple[int, ...], taken: tuple[int, ...], state: Any) -> Any:
        if (exchanged, taken) not in self._exchanges:
            self._exchanges[exchanged, taken] = self._p.exchange(exchanged, taken).lower(state).compile()
            processes.barrier("compile the exchange", HOURS)
        return self._exchanges[exchanged, taken]
