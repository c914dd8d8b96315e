"""`jaxlm train`: what happens in what order, from a `Run` to a run directory that holds everything about it."""

import gzip
import itertools
import lzma
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import corpus, model_source, open_model, run_directory
from jaxlm.assembly import program as programs
from jaxlm.assembly.run_directory import claim, has_ended
from jaxlm.core import config, config_io, errors, tree
from jaxlm.data import token_cache as caches
from jaxlm.evaluation import bootstrap, perplexity, task_scores
from jaxlm.evaluation.perplexity import make_eval_step
from jaxlm.evaluation.samples import of_losses
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.runtime import mesh, processes
from jaxlm.runtime.chips import peak_flops
from jaxlm.runtime.watchdog import Watchdog
from jaxlm.training import loop, report, run_logs
from jaxlm.training.environment import write_environment
from jaxlm.training.log import RunLog, read_lines
from jaxlm.training.progress import Meter, Progress

HOURS = 3600.0  # of barriers: who has died is found at once, so only who hangs is waited for so long


def train(run: config.Run) -> int:
    """Train, or continue, `run` in its directory. 0: finished; 1: stopped by a signal or a number that isn't finite."""
    main = jax.process_index() == 0
    processes.set_exit_hint(f"go on with: jaxlm train {run.folder}")
    continues = claim(run) if main else (run.folder / "config.json").exists()
    processes.barrier("the run directory", HOURS)  # nothing is written there before all have looked
    if continues and has_ended(run.folder):
        if main:
            print(f"{run.folder} is finished already; report: {report.build(run.folder)}")
        return 0
    tokens = open_model.load_tokenizer(run)
    p = programs.program(run, tokens, open_model.template_of(run))
    data = corpus.corpus(run.data, p.objective)
    processes.barrier("the data", 6 * HOURS)
    if main:
        if run.start and not (run.folder / "tokenizer").is_dir():
            model_source.look(run.start).save_text(run.folder / "tokenizer")
        else:
            tokens.save(run.folder / "tokenizer")
        config_io.dump(run, run.folder / "config.json")
        write_environment(run.folder, compiler_options=p.compiler_options)
        for name, note in p.notes.items():
            print(f"{name:12} {note}")
    processes.barrier("the first files", HOURS)
    if not (run.folder / "config.json").exists():
        raise ValueError(f"out: {run.folder} is not the same folder on all hosts; name one on storage that they share")
    with mesh.on_mesh(p.mesh), Checkpoints(run.folder / "checkpoints", keep=run.train.keep) as checkpoints:
        state, meta = _first_state(p, checkpoints)
        if p.objective.needs_reference:
            _remember_reference(p, data, None if meta else state.all_params)
        start = int(meta.get("step", 0))
        if continues and main:
            print(f"continuing {run.folder} after step {start}")
        ended = start == run.train.steps  # but its end was cut off
        with RunLog(run.folder, resume_step=start if meta else -1, ended=ended, enabled=main) as log:
            status = _run(p, data, state, meta, checkpoints, log)
    processes.barrier("the end", HOURS)
    return status


def _first_state(p: programs.Program, checkpoints: Checkpoints) -> tuple[Any, dict]:
    """From the newest sound checkpoint, straight to this mesh's shards, or from a model, or fresh."""
    folder = p.run.folder / run_directory.BASE
    if checkpoints.latest() is None:
        state = p.init_from(open_model.first_params(p)) if p.run.start else p.init()
        if base := _base(p, state.all_params):
            if jax.process_index() == 0:
                shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was cut off
            with Checkpoints(folder) as once:
                once.save(0, {"params": base}, {"step": 0}, wait=True)
        return state, {}
    abstract = p.abstract_state()
    values, meta = checkpoints.restore(run_directory.saved(abstract, p.adapter))
    base = _base(p, abstract.all_params)
    if base:
        with Checkpoints(folder) as once:
            base = once.restore_params(base)
    return run_directory.restored(values, base, p.optimizer), meta


def _base(p: programs.Program, weights: Any) -> Any:
    """Those that an adapter rests on; None: there are none."""
    base, _ = tree.partition(weights, p.adapter.in_frozen_base)
    return base if jax.tree.leaves(base) else None


def _remember_reference(p: programs.Program, data: corpus.Corpus, weights: Any | None) -> None:
    """What the first weights find of each record goes into it, and into a file for a run that is continued."""
    file = p.run.folder / "reference.npz"
    if weights is None:
        if not file.is_file():
            raise ValueError(f"{file}: is gone, and the weights at the start with it; train anew under another --name")
        with np.load(file) as held:
            found = [held[f"part{i}"] for i in range(len(held.files))]
    else:
        find = jax.jit(partial(p.objective.reference, p.model), out_shardings=p.whole)
        found = [
            np.concatenate([jax.device_get(find(weights, jax.tree.map(lambda x: x[0], batch))) for batch in batches])
            for batches in corpus.batches_by_part(p, data)
        ]
        if jax.process_index() == 0:
            np.savez(file, **{f"part{i}": values for i, values in enumerate(found)})
    for items, values in zip([*data.train, *data.valid], found, strict=True):
        if len(values) < len(items):
            raise ValueError(f"{file}: is of other data than data.train and data.valid now hold; train anew")
        for item, value in zip(items, values, strict=False):
            item["reference"] = value


def _run(
    p: programs.Program, data: corpus.Corpus, state: Any, meta: dict, checkpoints: Checkpoints, log: RunLog
) -> int:
    run, c, main = p.run, p.run.train, jax.process_index() == 0
    start = int(meta.get("step", 0))
    rows = p.rows(c.batch_size // c.micro_batches)
    loader = corpus.training_loader(run, p.objective, data, rows)
    compiled, compiling = _compile(p, state, p.to_device(loader.batch(start), rows), log, start)
    validate, gain = _validator(p, data, log), _gain(run, log)
    best = float(meta.get("stopping", {}).get("best", math.inf))
    sample = _sampler(p, log) if p.model.family.generates and c.prompts else lambda step, state: None
    if start == 0:
        sample(0, state)
        metrics, samples = validate(0, state)
        score(run, metrics)  # so that an unknown metric is found before the work
        gain(0, samples, False)
        count, trained = p.parameters
        log.event(0, "model", parameters=count, trainable=trained, notes=p.notes)
    flops, kind = p.flops_per_token(), jax.devices()[0].device_kind
    peak = peak_flops(kind)
    meter = Meter(c.steps, start=start, flops=flops, peak=peak and peak * jax.device_count())
    tokens_a_step = c.batch_size * c.seq_len

    def stuck(line: str) -> None:
        if c.stuck == "exit":
            processes.exit_with(line, 1)

    watch = Watchdog(
        run.folder, jax.process_index(), seconds=c.watchdog, compile_seconds=compiling,
        describe_stragglers=processes.describe_stragglers, on_stuck=stuck,
    )  # fmt: skip
    with Progress(c.steps, enabled=main) as progress, watch:
        sent = itertools.count(start + 1)

        def update(state: Any, batch: DeviceBatch) -> tuple[Any, dict]:
            out = compiled(state, batch)
            processes.step(next(sent))
            return out

        def show(step: int, metrics: dict, data_s: float, step_s: float) -> None:
            watch.beat(data_s + step_s)
            meter.update(data_s=data_s, step_s=step_s, tokens=tokens_a_step)
            reading = meter.read()
            progress.update(step, metrics, reading)
            if step % c.log_every == 0 or step == c.steps or not metrics["finite"]:
                log.train(step, metrics | {"tokens": step * tokens_a_step}, reading)

        def check(step: int, state: Any) -> dict:
            nonlocal best
            metrics, samples = validate(step, state)
            value = score(run, metrics)
            gain(step, samples, value < best)
            best = min(best, value)
            shown = [f"{k} {metrics[k]:.4f}" for k in ("loss", "bits_per_byte", "accuracy") if k in metrics]
            progress.say(f"step {step}: validation {', '.join(shown)}")
            meter.pause()
            return metrics | {"score": value}

        def save(step: int, state: Any, validation: dict | None, stopping: dict) -> None:
            meta = {"step": step, "loader": loader.state(step), "config": config_io.to_dict(run), "stopping": stopping}
            told = {"valid/score": validation["score"]} if validation else None
            checkpoints.save(step, run_directory.saved(state, p.adapter), meta, metrics=told)
            meter.pause()

        hooks = loop.Hooks(
            batches=loader.iterate,
            to_device=lambda batch: p.to_device(batch, rows),
            step=update,
            indices=loader.indices,
            log=show,
            validate=check,
            sample=sample,
            save=save,
        )
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
    _finish(p, end, sample, log)
    return 0


def _compile(
    p: programs.Program, state: Any, batch: DeviceBatch, log: RunLog, step: int
) -> tuple[Callable[[Any, DeviceBatch], Any], float]:
    """Ahead of the loop: the step compiles once, and says how long that took (given too) and what memory it needs.

    Batches of packed texts have a few shapes; those that come later compile when they come.
    """
    program, get = _once_a_shape(p.train_step(), "compile the step")
    started = time.perf_counter()
    memory = get(state, batch).memory_analysis()
    seconds = time.perf_counter() - started
    size = memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if jax.process_index() == 0:
        shown = f", {size / 2**20:,.0f} MiB a device" if size else ""
        print(f"compiled     the step in {seconds:.1f} s{shown}")
    if step == 0:  # a continued run's log is the uninterrupted run's
        log.event(0, "compiled", bytes_per_device=size, time={"seconds": seconds})
    return program, seconds


def _once_a_shape(program: Any, what: str) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]:
    """(the jitted `(state, batch) → …` to run, what gives it compiled for a batch).

    Processes wait for each other before a new program first runs: who compiles longer, for others find theirs in a
    cache, would be missed by a collective on CPUs after 30 s.
    """
    compiled: dict[tuple, Any] = {}

    def get(state: Any, batch: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in batch.values())
        if shapes not in compiled:
            compiled[shapes] = program.lower(state, batch).compile()
            processes.barrier(what, HOURS)
        return compiled[shapes]

    return lambda state, batch: get(state, batch)(state, batch), get


def score(run: config.Run, metrics: dict[str, float]) -> float:
    """Of a validation; lower is better."""
    name = run.train.metric
    if name not in metrics:
        raise ValueError(f"train.metric: unknown {name!r}{errors.nearest(name, metrics)}")
    falls = name.rpartition("/")[2] in ("loss", "nll", "perplexity", "bits_per_byte", "aux")
    return metrics[name] if falls else -metrics[name]


def _validator(p: programs.Program, data: corpus.Corpus, log: RunLog) -> Callable[[int, Any], tuple[dict, dict]]:
    step = make_eval_step(p.loss, p.objective.totals, p.tokens.bytes_per_token)
    evaluate_batch, _ = _once_a_shape(step, "compile the validation")

    def validate(step: int, state: Any) -> tuple[dict, dict[str, bootstrap.Sample]]:
        started = time.perf_counter()
        batches = corpus.validation_batches(p, data, p.run.train.eval_batches)
        parts = perplexity.parts(evaluate_batch, state.eval_params, batches)
        metrics, samples = perplexity.total(parts), {"losses": of_losses(parts)}
        if p.objective.predicts:
            most = p.run.train.eval_batches * (p.run.train.batch_size // p.run.train.micro_batches) or None
            records = [record for part in data.valid for record in part[:most]]
            predictions = corpus.predictions(p, state.eval_params, records)
            true, predicted = p.objective.answers(records, predictions)
            judged = task_scores.judge(p.objective.prediction.scores, p.run.objective, records, true, predicted)
            metrics |= judged.figures
            samples["answers"] = judged.sample
        log.valid(step, metrics, {"seconds": time.perf_counter() - started})
        return metrics, samples

    return validate


def _gain(run: config.Run, log: RunLog) -> Callable[[int, dict[str, bootstrap.Sample], bool], None]:
    """Of a run that starts from a model: each validation beside the one before the first step, which a file keeps."""
    file = run.folder / "start.npz"

    def gain(step: int, samples: dict[str, bootstrap.Sample], best: bool) -> None:
        if not run.start or jax.process_index():
            return
        if step == 0:
            held: dict[str, Any] = {name: sample.counts_NM for name, sample in samples.items()}
            np.savez_compressed(file, **held)
        elif file.is_file():
            with np.load(file) as before:
                found = bootstrap.gains(samples, before)
            if found:
                log.event(step, "gain", figures=found, resamples=bootstrap.RESAMPLES, best=best)

    return gain


def _sampler(p: programs.Program, log: RunLog) -> Callable[[int, Any], None]:
    c = p.run.train
    how = Sampling(tokens=c.sample_tokens, temperature=0.8, top_k=min(50, p.run.model.vocab), seed=p.run.seed)
    both_ways = p.objective.prompts_read_both_ways
    generate = Generator(p.model, [p.tokens.eos_id], p.objective.vocab_size, both_ways)
    prompts, source = p.objective.prompts(c.prompts)

    def sample(step: int, state: Any) -> None:
        for text, [answer] in zip(c.prompts, generate(state.eval_params, prompts, how, source), strict=True):
            new = p.tokens.decode(answer.tokens)
            log.sample(step, text, new)
            if jax.process_index() == 0 and step in (0, c.steps):
                print(f"── sample {'before' if step == 0 else 'after'} training ──\n{text}{new}")

    return sample


def _finish(p: programs.Program, end: loop.Outcome, sample: Callable[[int, Any], None], log: RunLog) -> None:
    sample(end.step, end.state)
    if jax.process_index():
        return
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
    if found := run_logs.gain(run_logs.read(run.folder)):
        note = f"step {found['step']} beside the model it starts from, {found['resamples']:,} resamples"
        print(bootstrap.table(found["figures"], note, ("after", "before")))
    log.event(end.step, "end", reason=end.reason, best=end.best, skipped=skipped)
    page = report.build(run.folder)
    print(f"{end.reason} at step {end.step}; report: {page}")


def compression(run: config.Run) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9 need for the very validation text, in one piece."""
    share = 0.0 if run.data.valid else run.data.holdout
    sources, part = (run.data.valid, "train") if run.data.valid else (run.data.train, "valid")
    texts = (t for s in sources for t in caches.texts(s, field=run.data.text_field, holdout=share, part=part))
    raw = "".join(texts).encode()
    return {
        "bytes": len(raw),
        "gzip": 8 * len(gzip.compress(raw, 9)) / len(raw),
        "xz": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
