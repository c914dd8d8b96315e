"""One start of `jaxlm train` with a clock on its parts, or validations beside their forward passes.
`startup.py` starts it in a fresh process.

    python benchmarks/startup_jaxlm.py '{"started": UNIX, "out": FILE, "arguments": ["train", …]}'
    python benchmarks/startup_jaxlm.py '{"out": FILE, "batches": 8, "rounds": 6}'

It is the command line as it is. Functions that begin and end a part are wrapped, and jax tells what it traces, lowers
and compiles. The process ends itself when its second step is logged, after a checkpoint of the first.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def clocks() -> tuple[float, float]:
    """Unix time, and the processor seconds of this process and those that it has waited for."""
    return time.time(), sum(os.times()[:4])


class Parts:
    """Seconds by part, each without those within it: [wall clock, processor]."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._open = ["imports"]
        self._at = (started, 0.0)

    def turn(self) -> None:
        """What passed since the last turn belongs to the part that is open."""
        now = clocks()
        spent = self.seconds.setdefault(self._open[-1], [0.0, 0.0])
        for i, (a, b) in enumerate(zip(self._at, now, strict=True)):
            spent[i] += b - a
        self._at = now

    def rename(self, name: str) -> None:
        self.turn()
        self._open[-1] = name

    def of(self, name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self._open.append(name)
            try:
                return f(*args, **kwargs)
            finally:
                self.turn()
                self._open.pop()

        return timed


def validations(out: str, batches: int, rounds: int) -> None:
    """Writes the seconds of the quickstart's validations and of the same forward passes, each waited for, in turns: by
    the clock, of the process, and of the thread that asks."""
    import jax

    from jaxlm import api
    from jaxlm.assembly import corpus, open_model, program, scoring

    run = api.load("quickstart", train={"eval_batches": batches})
    tokens = open_model.load_tokenizer(run, None)
    p = program.program(run, tokens)
    held = scoring.HeldOut(p, corpus.corpus(run.data, p.objective).valid)
    weights, scorer = p.init().eval_params, scoring.Scorer(p)
    placed = [{k: v for k, v in batch.items() if k not in ("unit", "checksum")} for batch in held.batches(p, batches)]
    loss = jax.jit(lambda w, batch: p.loss(w, jax.tree.map(lambda x: x[0], batch), None))

    def forward() -> None:
        for batch in placed:
            jax.block_until_ready(loss(weights, batch))

    found: dict[str, list[list[float]]] = {"forward": [], "whole": []}
    sides = {"forward": forward, "whole": lambda: scorer(weights, held, batches)}
    for turn in range(rounds + 1):
        for name, f in sides.items():
            before = [clock() for clock in (time.perf_counter, time.process_time, time.thread_time)]
            f()
            after = [clock() for clock in (time.perf_counter, time.process_time, time.thread_time)]
            if turn:  # the first compiles
                found[name].append([b - a for a, b in zip(before, after, strict=True)])
    with open(out, "w") as file:
        json.dump(found, file)


def main(started: float, out: str, arguments: list[str]) -> None:
    parts = Parts(started)
    import jax

    from jaxlm.assembly import training_hooks, training_run
    from jaxlm.commands import cli
    from jaxlm.formats.checkpoint import Checkpoints

    parts.rename("the rest")
    programs: list[dict[str, Any]] = []
    told = {
        "jaxpr_trace_duration": "trace",
        "jaxpr_to_mlir_module_duration": "lower",
        "backend_compile_duration": "compile",
    }
    blocked: list[float] = []
    first: dict[str, Any] = {}

    def heard(event: str, seconds: float, **about: Any) -> None:
        if (what := told.get(event.rpartition("/")[2])) is not None:
            programs.append({"program": about.get("fun_name", ""), "what": what, "seconds": seconds})

    def saved(save: Callable[..., bool]) -> Callable[..., bool]:
        def timed(*args: Any, **kwargs: Any) -> bool:
            before = time.perf_counter()
            made = save(*args, **kwargs)
            blocked.append(time.perf_counter() - before)
            return made

        return timed

    jax.monitoring.register_event_duration_secs_listener(heard)
    for where, name, part in (
        (training_run.open_model, "load_tokenizer", "tokenizer"),
        (training_run.programs, "program", "config and program"),
        (training_run.corpus, "corpus", "corpus"),
        (training_run, "first_state", "state"),
        (training_run.corpus, "training_loader", "first batch"),
        (training_run, "_compile", "compile the step"),
        (training_run.loop, "train", "first step"),
    ):
        setattr(where, name, parts.of(part, getattr(where, name)))
    for name, part in (("validator", "validation"), ("sampler", "samples")):
        made: Any = getattr(training_hooks, name)
        setattr(training_hooks, name, lambda *a, made=made, part=part, **k: parts.of(part, made(*a, **k)))
    setattr(Checkpoints, "save", saved(Checkpoints.save))  # noqa: B010  mypy refuses the assignment
    log_step = training_hooks.Keeper.log_step

    def logged(self: Any, step: int, *values: Any) -> None:
        parts.turn()
        if not first:
            wall, processor = (round(x, 3) for x in (clocks()[0] - started, clocks()[1]))
            taken = {part: list(seconds) for part, seconds in parts.seconds.items()}
            first.update(step=step, wall=wall, processor=processor, parts=taken, programs=list(programs))
        log_step(self, step, *values)
        if step == first["step"] + 1:
            self.checkpoints.wait()
            with open(out, "w") as file:
                json.dump(first | {"save_blocked": blocked}, file)
            os._exit(0)

    setattr(training_hooks.Keeper, "log_step", logged)  # noqa: B010
    sys.exit(cli.main(arguments))


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    (validations if "rounds" in request else main)(**request)
