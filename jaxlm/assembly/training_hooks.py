"""A run's training loop calls these: they validate, sample, log and save."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import corpus, kl_meter, run_directory, scoring
from jaxlm.assembly import program as programs
from jaxlm.core import config, config_io, errors
from jaxlm.core.figures import is_lower_better
from jaxlm.data.loader import Loader
from jaxlm.data.render_chat import encode
from jaxlm.data.tokenizer import decode_after
from jaxlm.evaluation import bootstrap
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.runtime import mesh, processes
from jaxlm.runtime.load import Load
from jaxlm.runtime.watchdog import Watchdog
from jaxlm.training.log import RunLog, shown
from jaxlm.training.progress import Meter, Progress

Samples = dict[str, bootstrap.Sample]
"""What the figures of a validation are resampled from, by kind; under `CLASSES` what those of each class are."""
CLASSES = "classes"
CLASS_RESAMPLES = 1_000  # for three figures of each class, at every validation


@dataclass
class Keeper:
    """The hooks of the loop that write the run's log and its checkpoints."""

    p: programs.Program
    loader: Loader
    checkpoints: Checkpoints
    log: RunLog
    meter: Meter
    watch: Watchdog
    progress: Progress
    validation: Callable[[int, Any], tuple[dict, Samples]]
    gain: Callable[[int, Samples, bool], None]
    on_step: Callable[[int, dict[str, float]], None] | None = None
    best: float = math.inf
    """The best score of a validation so far."""
    tokens: int = 0
    """Tokens that were read so far, without padding."""
    load: Load = field(init=False)

    def __post_init__(self) -> None:
        self.load = Load([d for d in mesh.devices() if d.process_index == jax.process_index()])

    def log_step(self, step: int, metrics: dict, data_s: float, step_s: float) -> None:
        """Shows a step, and logs every `log_every`th."""
        c = self.p.run.train
        positions = c.batch_size * c.seq_len
        tokens = int(metrics.get("tokens", positions))  # batches of other packages' objectives may have no segments
        self.tokens += tokens
        self.watch.beat(data_s + step_s)
        self.meter.update(data_s=data_s, step_s=step_s, tokens=tokens, positions=positions)
        reading = self.meter.read()
        self.progress.update(step, metrics, reading)
        if self.on_step is not None:
            self.on_step(step, metrics)
        if step % c.log_every == 0 or step == c.steps or not metrics["finite"]:
            self.log.train(step, metrics | {"tokens": self.tokens}, reading | self.load.read())

    def validate(self, step: int, state: Any) -> dict:
        """Returns the validation's metrics with their score."""
        metrics, samples = self.validation(step, state)
        value = score(self.p.run, metrics)
        self.gain(step, samples, value < self.best)
        self.best = min(self.best, value)
        told = ("loss", "bits_per_byte", "accuracy", kl_meter.NAME, run_metric(self.p.run))
        shown = [f"{k} {v:.4f}" for k, v in metrics.items() if k in told or k.rpartition("/")[2] == "accuracy"]
        self.progress.say(f"step {step}: validation {', '.join(shown)}")
        self.meter.pause()
        return metrics | {"score": value}

    def save(self, step: int, state: Any, validation: dict | None, stopping: dict) -> None:
        """Saves a checkpoint."""
        run = self.p.run
        meta = {"step": step, "loader": self.loader.state(step), "config": config_io.to_dict(run), "stopping": stopping,
                "tokens": self.tokens}  # fmt: skip
        metrics = {"valid/score": validation["score"]} if validation else None
        self.checkpoints.save(step, run_directory.saved(state, self.p.adapter), meta, metrics=metrics)
        self.meter.pause()


def announcing(
    program: Callable[[Any, DeviceBatch], Any], start: int
) -> Callable[[Any, DeviceBatch], tuple[Any, dict]]:
    """Returns the step, which also tells the other processes how many steps have been sent to the devices."""
    sent = itertools.count(start + 1)

    def update(state: Any, batch: DeviceBatch) -> tuple[Any, dict]:
        out = program(state, batch)
        processes.step(next(sent))
        return out

    return update


def score(run: config.Run, metrics: dict[str, float]) -> float:
    """Returns the score of a validation; lower is better. ValueError: `train.metric` is not among the metrics, or
    nothing says whether more or less of it is better."""
    name, way = run_metric(run), run.train.metric.rpartition(":")[0]
    if name not in metrics or way not in ("", "min", "max"):
        raise ValueError(f"train.metric: unknown {run.train.metric!r}{errors.nearest(name, metrics)}")
    lower = is_lower_better(name) if not way else way == "min"
    if lower is None:
        raise ValueError(f"train.metric: say whether less or more of {name!r} is better: min:{name} or max:{name}")
    return metrics[name] if lower else -metrics[name]


def run_metric(run: config.Run) -> str:
    """Returns the name of the metric that says which checkpoint is best."""
    return run.train.metric.rpartition(":")[2]


def validator(
    p: programs.Program, data: corpus.Corpus, log: RunLog, scorer: scoring.Scorer,
    moved: Callable[[Any], dict[str, float]] = lambda weights: {},
) -> Callable[[int, Any], tuple[dict, Samples]]:  # fmt: skip
    """Returns the validation: `(step, state) → (metrics, what they may be resampled from)`. `moved`: measures how far
    weights are from those before the run."""
    held = scoring.HeldOut(p, data.valid)

    def validate(step: int, state: Any) -> tuple[dict, Samples]:
        started = time.perf_counter()
        found = scorer(state.eval_params, held, p.run.train.eval_batches)
        metrics = found.losses | found.task | moved(state.eval_params)
        log.valid(step, metrics, {"seconds": time.perf_counter() - started})
        if found.mistakes:
            log.event(step, "answers", part="valid", **found.mistakes)
        return metrics, found.samples if found.classes is None else found.samples | {CLASSES: found.classes}

    return validate


def gain_log(run: config.Run, log: RunLog) -> Callable[[int, Samples, bool], None]:
    """Returns what logs each validation beside the one before the first step, which a file keeps; it does nothing for a
    run that doesn't start from a model."""
    file = run.folder / "start.npz"

    def gain(step: int, samples: Samples, best: bool) -> None:
        if not run.start or jax.process_index():
            return
        if step == 0:
            counts: dict[str, Any] = {name: sample.counts_NM for name, sample in samples.items()}
            np.savez_compressed(file, **counts)
        elif file.is_file():
            with np.load(file) as before:
                figures = {name: sample for name, sample in samples.items() if name != CLASSES}
                gains = bootstrap.gains(figures, before)
                each = {CLASSES: samples[CLASSES]} if CLASSES in samples else {}
                classes = bootstrap.by_class(bootstrap.gains(each, before, CLASS_RESAMPLES))
            more = {"classes": classes, "class_resamples": CLASS_RESAMPLES} if classes else {}
            if gains:
                log.event(step, "gain", figures=gains, resamples=bootstrap.RESAMPLES, best=best, **more)

    return gain


def sampler(p: programs.Program, log: RunLog) -> Callable[[int, Any], None]:
    """Returns what continues the run's prompts, or answers them as messages of a chat, and logs the texts."""
    c, template = p.run.train, p.objective.chat_template
    how = Sampling(tokens=c.sample_tokens, seed=p.run.seed)
    if p.objective.goes_on:  # the likeliest answer is the answer, but the likeliest text repeats itself
        how = dataclasses.replace(how, temperature=0.8, top_k=min(50, p.run.model.vocab))
    both_ways = p.objective.prompts_read_both_ways
    generate = Generator(p.model, p.objective.end_ids, p.objective.vocab_size, both_ways)
    prompts, source = p.objective.prompts(c.prompts)
    if template:
        prompts = [encode(p.tokens, template, [dict(role="user", content=text)]) for text in c.prompts]

    def sample(step: int, state: Any) -> None:
        found = generate(state.eval_params, prompts, how, source)
        for text, before, [answer] in zip(c.prompts, prompts, found, strict=True):
            new = decode_after(p.tokens, before, answer.tokens)
            log.sample(step, text, new, p.objective.goes_on)
            if jax.process_index() == 0 and step in (0, c.steps):
                print(f"── sample {'before' if step == 0 else 'after'} training ──")
                print(shown(text, new, p.objective.goes_on))

    return sample
