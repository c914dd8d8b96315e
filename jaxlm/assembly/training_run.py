"""A run is trained here: what happens in what order, from a `Run` to a run directory that holds all about it."""

import gzip
import lzma
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import (
    continual_methods,
    corpus,
    earlier,
    infer_task,
    kl_meter,
    moments,
    new_data,
    on_policy,
    open_model,
    remember,
    run_directory,
    scoring,
    teacher,
    teacher_cache,
    training_hooks,
    verify_attention,
)
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.assembly.program import HOURS
from jaxlm.assembly.run_directory import claim, has_ended
from jaxlm.assembly.updates import Updates
from jaxlm.core import config
from jaxlm.data import token_cache as caches
from jaxlm.evaluation import bootstrap
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.nn import attention
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.runtime import mesh, processes
from jaxlm.runtime.chips import peak_flops
from jaxlm.runtime.watchdog import Watchdog
from jaxlm.training import loop, optimizers, report, run_logs
from jaxlm.training.distributed import replicas
from jaxlm.training.environment import write_environment
from jaxlm.training.log import RunLog, read_lines
from jaxlm.training.progress import Meter, Progress


def train(run: config.Run, start: StartModel, on_step: Callable[[int, dict[str, float]], None] | None = None) -> int:
    """Trains, or continues, a run in its directory. `start` is the model that it starts from, if `run.start` names one.
    `on_step` is called with the number and the metrics of each step, when they are there: one step late.

    Returns the exit status. 0: finished; 1: stopped by a signal or a number that isn't finite.
    """
    with run_directory.removed_if_refused(run.folder) as begins:
        return _train(run, start, begins, on_step)


def _train(
    run: config.Run,
    start: StartModel,
    begins: Callable[[], None],
    on_step: Callable[[int, dict[str, float]], None] | None,
) -> int:
    main = jax.process_index() == 0
    processes.set_exit_hint(f"go on with: jaxlm train {run.folder}")
    continues = claim(run) if main else (run.folder / "config.json").exists()
    before = run_directory.earlier_steps(run)
    processes.barrier("the run directory", HOURS)  # nothing is written there before all have looked
    if continues and has_ended(run.folder) and before is None:
        if main:
            print(f"{run.folder} is finished already; report: {report.build(run.folder)}")
            print(f"for more steps: jaxlm train {run.folder} --train.steps {2 * run.train.steps}")
        return 0
    if Checkpoints(run.folder / "checkpoints").latest() is None:
        moments.check(run, start)
    tokens = open_model.load_tokenizer(run, start)
    p = programs.program(
        run, tokens, open_model.template_of(run, start), earlier.earlier_tasks(run, start), teacher.source(run)
    )
    p.adapter.check_trained()
    data = corpus.corpus(run.data, p.objective)
    processes.barrier("the data", 6 * HOURS)
    if main:
        open_model.save_description(run, tokens, start)
        write_environment(run.folder, compiler_options=p.compiler_options)
        for name, note in p.notes.items():
            print(f"{name:12} {note}")
        for line in () if continues else new_data.told(run, start):
            print(line)
    processes.barrier("the first files", HOURS)
    if not (run.folder / "config.json").exists():
        raise ValueError(f"out: {run.folder} is not the same folder on all hosts; name one on storage that they share")
    with mesh.on_mesh(p.mesh), Checkpoints(run.folder / "checkpoints", keep=run.train.keep) as checkpoints:
        state, meta = first_state(p, checkpoints, start)
        state = remember.remember(p, state, start, begins=not meta)
        state = teacher.attached(p, state, begins=not meta)
        if p.objective.needs_reference:
            _remember_reference(p, data, None if meta else state.all_params)
        step = int(meta.get("step", 0))
        if continues and main:
            print(f"continuing {run.folder} after step {step}")
        ended = step == run.train.steps  # but its end was cut off
        with RunLog(run.folder, resume_step=step if meta else -1, ended=ended, enabled=main) as log:
            if run.start and not meta:
                log.event(0, "start", model=run.start, new_head=open_model.new_head(p, start))
                if warnings := new_data.warnings(run, start):
                    log.event(0, "warnings", lines=warnings)
            if before is not None:
                _give_more_steps(p, before, step, meta, log)
            status = _run(p, data, state, meta, checkpoints, log, begins, on_step)
    processes.barrier("the end", HOURS)
    return status


def first_state(p: programs.Program, checkpoints: Checkpoints, start: StartModel) -> tuple[Any, dict]:
    """Returns the state and what its checkpoint says of it: the newest sound checkpoint's, read straight to this mesh's
    shards, or that of the model it starts from, or a fresh one."""
    if checkpoints.latest() is None:
        state = moments.first_state(p, start)
        if base := run_directory.frozen_base(p.adapter, state.all_params):
            run_directory.write_base(p.run.folder, base)
        return state, {}
    if {"grown", "imported", "merged"} & checkpoints.read_meta().keys():
        raise ValueError(
            f"{p.run.folder}: holds a model without an optimizer's state, so it does not go on; start a new "
            f"run from it: jaxlm train CONFIG --start {p.run.folder}"
        )
    abstract = p.abstract_state()
    values, meta = checkpoints.restore(run_directory.saved(abstract, p.adapter))
    base = run_directory.frozen_base(p.adapter, abstract.all_params)
    if base:
        with Checkpoints(p.run.folder / run_directory.BASE) as once:
            base = once.restore_params(base)
    return run_directory.restored(values, base, p.optimizer), meta


def _give_more_steps(p: programs.Program, before: int, step: int, meta: dict, log: RunLog) -> None:
    """Logs that a run goes on beyond its end, says what that does to its learning rate, and forgets how many
    validations were worse."""
    log.event(step, "more", steps=p.run.train.steps, before=before)
    if "stopping" in meta:
        meta["stopping"] = meta["stopping"] | {"bad": 0}
    if jax.process_index() == 0 and step:
        old, new = (float(optimizers.schedule(p.run.optim, n)(step - 1)) for n in (before, p.run.train.steps))
        print(f"train.steps {before} → {p.run.train.steps}: the schedule is now that of {p.run.train.steps} steps; "
              f"the learning rate goes on at {new:.3g}, where it was {old:.3g}")  # fmt: skip


def _remember_reference(p: programs.Program, data: corpus.Corpus, weights: Any | None) -> None:
    """Stores what the first weights compute for each record in it, and in a file for when the run is continued."""
    file = p.run.folder / "reference.npz"
    if weights is None:
        if not file.is_file():
            raise ValueError(f"{file}: is gone, and the weights at the start with it; train anew under another `name`")
        with np.load(file) as stored:
            references = [stored[f"part{i}"] for i in range(len(stored.files))]
    else:
        compute = jax.jit(partial(p.objective.reference, p.model), out_shardings=p.whole)
        references = [
            np.concatenate([jax.device_get(compute(weights, jax.tree.map(lambda x: x[0], batch))) for batch in batches])
            for batches in corpus.batches_by_source(p, data)
        ]
        if jax.process_index() == 0:
            np.savez(file, **{f"part{i}": values for i, values in enumerate(references)})
    for items, values in zip([*data.train, *data.valid, *data.test], references, strict=True):
        if len(values) < len(items):
            raise ValueError(f"{file}: is of other data than data.train, data.valid and data.test now hold; train anew")
        for item, value in zip(items, values, strict=False):
            item["reference"] = value


def _run(
    p: programs.Program,
    data: corpus.Corpus,
    state: Any,
    meta: dict,
    checkpoints: Checkpoints,
    log: RunLog,
    begins: Callable[[], None],
    on_step: Callable[[int, dict[str, float]], None] | None,
) -> int:
    """Trains on from the state to the last step, or to a signal; returns the exit status."""
    run, c, main = p.run, p.run.train, jax.process_index() == 0
    start = int(meta.get("step", 0))
    rows = p.rows(p.new_rows)
    example = teacher_cache.example(p, data, begins=not meta)
    loader = corpus.training_loader(run, p.objective, data, rows, remember.replayed(p, rows), example)
    updates = Updates(p, start)
    compile_seconds = _compile(p, updates, state, p.to_device(loader.batch(start), rows), log, start)
    scorer = scoring.Scorer(p)
    moved = kl_meter.meter(p, data, state.eval_params if start == 0 else None)
    validate, gain = training_hooks.validator(p, data, log, scorer, moved), training_hooks.gain_log(run, log)
    sample = (
        training_hooks.sampler(p, log)
        if p.model.family.generates and p.model.config.head and c.prompts
        else lambda step, state: None
    )
    if start == 0:
        sample(0, state)
        metrics, samples = validate(0, state)
        training_hooks.score(run, metrics)  # so that an unknown metric is found before the work
        gain(0, samples, False)
        _log_model(p, state, log)
    meter, watch = speed_meter(p, start), stuck_watchdog(run, compile_seconds)
    with Progress(c.steps, enabled=main) as progress, watch:
        keeper = training_hooks.Keeper(p, loader, checkpoints, log, meter, watch, progress, validate, gain, on_step)
        keeper.tokens = int(meta.get("tokens", start * c.batch_size * c.seq_len))
        keeper.best = float(meta.get("stopping", {}).get("best", math.inf))
        hooks = loop.Hooks(
            batches=loader.iterate,
            to_device=lambda batch: p.to_device(batch, rows),
            step=training_hooks.announcing(on_policy.updates(p, loader, rows, updates, start), start),
            indices=loader.indices,
            log=keeper.log_step,
            validate=keeper.validate,
            sample=sample,
            save=keeper.save,
            read=replicas.read if p.apart else loop.read_metrics,
        )
        begins()
        try:
            end = loop.train(
                state,
                hooks,
                start=start,
                steps=c.steps,
                eval_every=c.eval_every,
                sample_every=c.sample_every,
                save_every=c.save_every,
                patience=c.patience,
                stop_on_nonfinite=c.nonfinite == "stop",
                save_best=c.use == "best",
                **meta.get("stopping", {}),
            )
        except loop.NonFiniteError as error:
            log.event(start, "stopped", reason=str(error))
            raise
    checkpoints.wait()
    if end.reason == "interrupted":
        if main:
            print(f"interrupted after step {end.step}; saved. Go on with: jaxlm train {run.folder}")
        return 1
    sample(end.step, end.state)
    if continual_methods.separate(run):
        infer_task.note(p, end.state.all_params, data.train)
    used = (checkpoints.best() if c.use == "best" else None) or end.step
    if data.test:
        _test(p, data, scorer, checkpoints, end, used, log)
    if main:
        _finish(p, end, used, log)
    return 0


def _log_model(p: programs.Program, state: Any, log: RunLog) -> None:
    """Logs how many weights there are, and what methods of continual learning hold beside them."""
    (count, trained), (added, size) = p.parameters, p.added
    held = sum(x.nbytes for x in jax.tree.leaves((state.memory, state.tracks)))
    log.event(0, "model", parameters=count, trainable=trained, notes=p.notes, added=added, added_bytes=size,
              memory_bytes=held)  # fmt: skip


def speed_meter(p: programs.Program, start: int) -> Meter:
    """Returns what measures the speed from now on."""
    flops, peak = p.flops_per_token(), peak_flops(jax.devices()[0].device_kind)
    return Meter(p.run.train.steps, start=start, flops=flops, peak=peak and peak * jax.device_count())


def stuck_watchdog(run: config.Run, compile_seconds: float) -> Watchdog:
    """Returns what notices that no step ends any more."""

    def stuck(line: str) -> None:
        if run.train.stuck == "exit":
            processes.exit_with(line, 1)

    return Watchdog(
        run.folder, jax.process_index(), seconds=run.train.watchdog, compile_seconds=compile_seconds,
        describe_stragglers=processes.describe_stragglers, on_stuck=stuck,
    )  # fmt: skip


def _compile(
    p: programs.Program, updates: Updates, state: Any, batch: DeviceBatch, log: RunLog, step: int
) -> float:  # fmt: skip
    """Compiles the step ahead of the loop, and says how long that took, what memory it needs and where layers attend
    otherwise than was announced; fused attention is compared with plain attention. Returns the seconds.

    Batches of packed texts have a few shapes; those that come later compile when they come.
    """
    started = time.perf_counter()
    with attention.recorded() as requests:
        memory = updates.compiled(state, batch).memory_analysis()
    seconds = time.perf_counter() - started
    size = memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if jax.process_index() == 0:
        shown = f", {size / 2**20:,.0f} MiB a device" if size else ""
        print(f"compiled     the step in {seconds:.1f} s{shown}")
        others = {r.choice.describe() for r in requests if r.choice != p.choices.attention}
        for line in sorted(others) if p.choices.attention is not None else ():
            print(f"attention    also {line}")
    verified = verify_attention.verify(p, requests, batch)
    if verified and jax.process_index() == 0:
        print(f"verified     attention is {verified}")
    if step == 0:  # a continued run's log is the uninterrupted run's
        log.event(0, "compiled", bytes_per_device=size, time={"seconds": seconds})
    return seconds


def _test(
    p: programs.Program, data: corpus.Corpus, scorer: scoring.Scorer, checkpoints: Checkpoints, end: loop.Outcome,
    used: int, log: RunLog,
) -> None:  # fmt: skip
    """Scores the weights that the run uses, those of the step `used`, on the test data."""
    weights = end.state.eval_params
    if used != end.step:
        weights = run_directory.saved_weights(checkpoints, used, p.abstract_state(), end.state, p.adapter, p.optimizer)
    found = scorer(weights, scoring.HeldOut(p, data.test))
    intervals: dict[str, Any] = {}
    for sample in found.samples.values():
        intervals |= {n: ends for n, ends in bootstrap.intervals(sample).items() if n not in intervals}
    figures = {name: value for name, value in found.figures.items() if name.rpartition("/")[2] != "targets"}
    log.event(end.step, "test", used=used, figures=figures, resamples=bootstrap.RESAMPLES,
              intervals={name: ends for name, ends in intervals.items() if name in figures},
              over=bootstrap.size(next(iter(found.samples.values()))))  # fmt: skip
    if found.mistakes:
        log.event(end.step, "answers", part="test", **found.mistakes)


def _finish(p: programs.Program, end: loop.Outcome, used: int, log: RunLog) -> None:
    """Writes the end of the log and the report, and says what came out. `used`: the step that the run uses."""
    run = p.run
    if run.data.compare_compression:
        compressed = compression(run)
        log.event(end.step, "compression", **compressed)
        final = [line for line in read_lines(run.folder / "metrics.jsonl") if line["kind"] == "valid"][-1]
        print(
            f"bits per byte of the validation text: gzip -9 {compressed['gzip']:.3f}, xz -9 {compressed['xz']:.3f}, "
            f"this model {final['bits_per_byte']:.3f}"
        )
    skipped = sum(line.get("finite") == 0 for line in read_lines(run.folder / "metrics.jsonl"))
    if skipped:
        print(f"{skipped} updates were left out because their loss or gradient was not finite")
    log.event(end.step, "end", reason=end.reason, best=end.best, skipped=skipped, used=used)
    logs = run_logs.read(run.folder)
    if gain := run_logs.gain(logs):
        head = ", whose head is new" if logs.events.get("start", {}).get("new_head") else ""
        note = f"step {gain['step']} beside the model it starts from{head}, {gain['resamples']:,} resamples"
        print(bootstrap.table(gain["figures"], note, ("after", "before")))
    found = run_logs.results(logs)
    for line in filter(None, [*map(run_logs.said, found), run_logs.advice(found)]):
        print(line)
    page = report.build(run.folder)
    print(f"{end.reason} at step {end.step}; report: {page}")


def compression(run: config.Run) -> dict[str, float]:
    """Returns the bits per byte that gzip -9 and xz -9 need for the same validation text, in one piece."""
    share = 0.0 if run.data.valid else run.data.holdout
    sources, part = (run.data.valid, "train") if run.data.valid else (run.data.train, "valid")
    texts = (t for s in sources for t in caches.texts(s, field=run.data.text_field, holdout=share, part=part))
    raw = "".join(texts).encode()
    return {
        "bytes": len(raw),
        "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw),
        "xz": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
