"""Coordinates a run of workers that are jobs of their own: starts its server, writes its log, validates the global
weights, and keeps the final ones as an ordinary checkpoint."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.assembly import corpus, moments, open_model, run_directory, scoring, training_run
from jaxlm.assembly import program as programs
from jaxlm.assembly.distributed import ray_cluster, ray_server, terms
from jaxlm.assembly.distributed.crew import Crew
from jaxlm.assembly.distributed.local_steps import LocalSteps
from jaxlm.assembly.model_source import StartModel
from jaxlm.core import config, config_io
from jaxlm.evaluation import bootstrap
from jaxlm.formats import server_state
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.runtime import mesh
from jaxlm.runtime.processes import ProcessError
from jaxlm.training import loop, report
from jaxlm.training.environment import write_environment
from jaxlm.training.log import RunLog, read_lines, replace_file
from jaxlm.training.step import State

POLL = 0.3
"""Seconds between two looks at the server."""
FREED = 60.0
"""Seconds within which Ray notices that a coordinator is dead."""
TOLD = ("joined", "returned", "lost", "left", "late", "replaced", "quorum")
"""Events that are printed as they happen."""


class Watch:
    """A Watch follows the server of a run: it puts what happens into the log, and validates when that is due. `logged`
    is the last version that the log has already: a server that was started again tells of it once more."""

    def __init__(self, steps: LocalSteps, state: State, keeper: Any, log: RunLog, logged: int) -> None:
        self.steps, self.state, self.keeper, self.log, self.logged = steps, state, keeper, log, logged
        self.run = steps.run
        self.epoch, self.seen, self.tokens, self.printed = "", 0, 0, -math.inf
        self.last: dict[str, Any] = {"clock": 0, "version": 0, "members": {}, "gone": {}, "ended": ""}
        data = corpus.corpus(self.run.data, steps.p.objective, ("valid", "test"))
        self.held, self.test = scoring.HeldOut(steps.p, data.valid), data.test
        self.scorer = scoring.Scorer(steps.p)
        every = self.run.train.eval_every
        self.validated = -1
        self._due = every or math.inf

    def look(self) -> dict[str, Any]:
        """Asks the server where the run stands, and logs what has happened since the last time. Waits within bounds for
        a server that was killed."""
        ray = ray_cluster.need()
        server = self.run.distributed.server
        status = ray_cluster.bounded(
            "the server", server.wait,
            lambda: ray.get(self.keeper.status.remote(self.epoch, self.seen), timeout=server.timeout),
        )  # fmt: skip
        if status["epoch"] != self.epoch:
            if self.epoch:
                self._event(
                    status["clock"], "restarted", version=status["version"], before=self.last["version"],
                    why=status["why"] or "its process ended",
                )  # fmt: skip
            self.epoch, self.seen, self.logged = status["epoch"], 0, min(self.logged, status["version"])
        for event in status["events"]:
            self._log(event, status)
        self.seen += len(status["events"])
        self.last = status
        return status

    def validate_if_due(self) -> None:
        """Validates the global weights if the run has come to where that is due."""
        if self.last["clock"] >= self._due and not self.last["ended"]:
            clock = self.fetch()
            every = self.run.train.eval_every
            self._due = every * (clock // every + 1)
            self.validate(clock)

    def fetch(self) -> int:
        """Takes up the global weights as they are now; returns the step of the run that they are of."""
        ray, server = ray_cluster.need(), self.run.distributed.server

        def get() -> tuple[int, int, list[np.ndarray]]:
            version, clock, refs = ray.get(self.keeper.current.remote(), timeout=server.timeout)
            return version, clock, ray.get(list(refs), timeout=server.timeout)

        _, clock, parts = ray_cluster.bounded("the global weights", server.wait, get)
        self.state = self.steps.take_up(self.state, clock, np.concatenate(parts))
        return clock

    def validate(self, step: int) -> dict[str, float]:
        """Scores the weights last fetched on the validation data, and logs it."""
        began = time.perf_counter()
        found = self.scorer(self.state.eval_params, self.held, self.run.train.eval_batches)
        metrics = found.losses | found.task
        self.log.valid(step, metrics, {"seconds": time.perf_counter() - began})
        self.validated = step
        shown = [f"{name} {metrics[name]:.4f}" for name in ("loss", "bits_per_byte", "accuracy") if name in metrics]
        print(f"step {step}: validation {', '.join(shown)}", flush=True)
        return metrics

    def _log(self, event: dict[str, Any], status: dict[str, Any]) -> None:
        name, step = event["name"], event["clock"]
        rest = {k: v for k, v in event.items() if k not in ("name", "clock", "time")}
        if name == "version":
            self.tokens = int(event["tokens"])
            if event["version"] <= self.logged:
                return
            self.logged = event["version"]
            behind = event["staleness"]
            loss = {} if event["loss"] is None else {"loss": event["loss"]}
            figures = loss | dict(
                version=event["version"], workers=len(event["workers"]), staleness=sum(behind) / len(behind),
                tokens=self.tokens, received=status["received"], sent=status["sent"],
            )  # fmt: skip
            self.log.train(step, figures, {"server_s": event["time"]})
            if time.monotonic() - self.printed > 10:
                self.printed = time.monotonic()
                shown = "" if event["loss"] is None else f"  loss {event['loss']:.4f}"
                print(f"step {step}/{self.run.train.steps}  version {event['version']}{shown}  "
                      f"workers {', '.join(event['workers'])}", flush=True)  # fmt: skip
        elif name != "end":
            self._event(step, name, **rest)

    def _event(self, step: int, event: str, **info: Any) -> None:
        self.log.event(step, f"server_{event}", **info)
        if event in (*TOLD, "restarted"):
            shown = ", ".join(f"{k} {v}" for k, v in info.items() if v not in (None, "", {}))
            print(f"step {step}: {event}: {shown}", flush=True)


def coordinate(
    run: config.Run, start: StartModel, *, address: str = "", local: int = 0, dashboard: bool = False
) -> int:
    """Runs the server of a run until it ends; it goes on from the server's last checkpoint if there is one. `address`:
    of the Ray cluster to join; empty: one is started here. `local`: workers to start on this machine and to watch over.
    Returns the exit status: 0: finished; 1: interrupted, or too few workers."""
    ray_cluster.need()
    terms.check(run)
    with run_directory.removed_if_refused(run.folder) as begins:
        continues = run_directory.claim(run)
        if continues and run_directory.has_ended(run.folder):
            print(f"{run.folder} is finished already; report: {report.build(run.folder)}")
            return 0
        one = on_one_device(run) if local else run
        tokens = open_model.load_tokenizer(run, start)
        p = programs.program(one, tokens, open_model.template_of(run, start))
        steps = LocalSteps(run, p, corpus.Corpus([], [], []))
        with mesh.on_mesh(p.mesh):
            state = moments.first_state(p, start)
            if server_state.newest(run.folder / ray_server.FOLDER) is None:
                ray_server.write_first(run, steps.vector(state))
            open_model.save_description(run, tokens, start)
            write_environment(run.folder)
            return _coordinate(steps, state, begins, address, local, dashboard)


def on_one_device(run: config.Run) -> config.Run:
    """Returns the run as it is validated on one device, whatever the mesh of the workers."""
    return dataclasses.replace(run, mesh=config.Mesh())


def _coordinate(
    steps: LocalSteps, state: State, begins: Callable[[], None], address: str, local: int, dashboard: bool
) -> int:
    run = steps.run
    ray = ray_cluster.need()
    others = ray_cluster.connect(address, dashboard)
    try:
        keeper = _start(run, terms.of(run, steps.p))
        server = run.distributed.server
        at = ray_cluster.bounded(
            "the server", server.wait, lambda: ray.get(keeper.status.remote("", 0), timeout=server.timeout)
        )
        begins()
        print(f"the server of {run.name} is at version {at['version']}, step {at['clock']} of {run.train.steps}; "
              f"workers join by: jaxlm work {run.folder} --address {others}", flush=True)  # fmt: skip
        logged = _forget(run.folder, at["version"])
        with (
            RunLog(run.folder, resume_step=at["clock"] if at["version"] else -1) as log,
            Crew(run, others, local) as crew,
            loop.stop_signals() as signals,
        ):
            watch = Watch(steps, state, keeper, log, logged)
            if not at["version"]:
                log.event(0, "model", parameters=steps.p.parameters[0], trainable=steps.count, notes=steps.p.notes)
                watch.validate(0)
            while not watch.look()["ended"] and not signals:
                watch.validate_if_due()
                crew.look(watch.last)
                time.sleep(POLL)
            if signals:
                print(f"interrupted at version {watch.last['version']}; go on with: jaxlm coordinate {run.folder}")
                return 1
            if watch.last["failed"]:
                raise ProcessError(f"{watch.last['ended']}; go on with: jaxlm coordinate {run.folder}")
            _finish(watch)
            crew.farewell(lambda: watch.look()["members"])
        return 0
    finally:
        ray.shutdown()


def _start(run: config.Run, agreed: dict[str, Any]) -> Any:
    """Starts the server. Where a coordinator has just died, its server's name is free a moment later. ValueError: a
    server of this name lives in the cluster."""

    def start() -> Any:
        try:
            return ray_server.start(run, agreed)
        except ValueError as error:
            raise ray_cluster.Away(str(error)) from None

    try:
        return ray_cluster.bounded("the name of the server", FREED, start)
    except ProcessError:
        raise ValueError(
            f"name: a server of {run.name} runs in this cluster already; stop it, or choose another `name`"
        ) from None


def _forget(folder: Path, version: int) -> int:
    """Removes from a run's log what came after a version, which the server goes on from; returns the last version whose
    training the log has."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return 0
    kept = [line for line in read_lines(file) if line.get("version", 0) <= version]
    replace_file(file, "".join(json.dumps(line) + "\n" for line in kept))
    return max((line["version"] for line in kept if line["kind"] == "train"), default=0)


def _finish(watch: Watch) -> None:
    """Scores the final weights, keeps them as a checkpoint, and writes the end of the log and the report."""
    run, steps, log = watch.run, watch.steps, watch.log
    step = watch.fetch()
    metrics = watch.validate(step)
    with Checkpoints(run.folder / "checkpoints", keep=run.train.keep) as checkpoints:
        held = run_directory.saved(watch.state, steps.p.adapter)
        if base := run_directory.frozen_base(steps.p.adapter, watch.state.all_params):
            run_directory.write_base(run.folder, base)
        meta = {"step": step, "tokens": watch.tokens, "config": config_io.to_dict(run)}
        checkpoints.save(step, held, meta, wait=True)
    if watch.test:
        found = watch.scorer(watch.state.eval_params, scoring.HeldOut(steps.p, watch.test))
        intervals: dict[str, Any] = {}
        for sample in found.samples.values():
            intervals |= {n: ends for n, ends in bootstrap.intervals(sample).items() if n not in intervals}
        log.event(step, "test", used=step, figures=found.figures, resamples=bootstrap.RESAMPLES, intervals=intervals,
                  over=bootstrap.size(next(iter(found.samples.values()))))  # fmt: skip
    if run.data.compare_compression:
        log.event(step, "compression", **training_run.compression(run))
    last = watch.last
    log.event(step, "server", received=last["received"], sent=last["sent"], version=last["version"],
              gone=last["gone"], time={"save_seconds": last["save_seconds"]})  # fmt: skip
    log.event(step, "end", reason="finished", best=metrics["loss"], skipped=0, used=step)
    print(f"finished at step {step}, version {last['version']}, {last['received']:,} bytes received, "
          f"{last['sent']:,} sent; report: {report.build(run.folder)}", flush=True)  # fmt: skip
