"""A model is evaluated, whatever its format: on validation data, public tasks, programs it writes, or texts."""

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.assembly import corpus as corpora
from jaxlm.assembly import scoring
from jaxlm.assembly.generation_advice import advice
from jaxlm.assembly.open_model import Place, Pretrained, open_model, program, source_of
from jaxlm.core import config
from jaxlm.core.errors import nearest
from jaxlm.evaluation import bootstrap, harness, pass_at_k, sandbox, text_metrics
from jaxlm.evaluation.bootstrap import Sample
from jaxlm.evaluation.samples import of_tasks
from jaxlm.inference import stream
from jaxlm.inference.sampling import Sampling, room
from jaxlm.objectives import OBJECTIVES
from jaxlm.runtime import mesh
from jaxlm.training import run_logs

Rows = Literal["valid", "test"]


class Evaluation(NamedTuple):
    """An `Evaluation` holds the result of one."""

    figures: dict[str, float]
    report: str
    """The report on predictions, where the objective makes them."""
    samples: dict[str, Sample]
    """The samples that the figures may be resampled from."""
    data: tuple[str, ...]
    """Sources; empty: held out of the run's training data."""
    part: str
    """What the rows are to the run: valid, test, or data that was named."""
    role: str
    """Whether the run was trained on the rows, or its checkpoint chosen by them."""
    examples: list[dict[str, Any]]
    """The true and the predicted answer of each example, where the objective makes predictions."""


def evaluate(
    place: Place, *, data: Sequence[str] | None = None, rows: Rows | None = None, step: int | None = None,
    batches: int = 0, window: int | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluates on the run's `rows`, or on `data`; on `batches` of each source if not 0. `rows` are those of its test
    data, where it has some and nothing else is said, or of its validation data. `window`: a row's tokens, if not those
    that the model was trained with."""
    if batches < 0:
        raise ValueError(f"batches: {batches} is out of range; give 1 or more, or 0 for all")
    opened = open_model(place, step)
    settings = None if opened.source.is_trained_here else opened.source.objective
    if settings is not None and data:  # what a published head leaves open
        settings = OBJECTIVES.of(settings).infer_from_data(settings, data)
    p = program(opened, data, settings=settings, window=window)
    part = _part(p.run.data, data, rows)
    corpus = corpora.corpus(p.run.data, p.objective, (part,))
    with mesh.on_mesh(p.mesh):
        found = scoring.Scorer(p)(opened.params, scoring.HeldOut(p, getattr(corpus, part)), batches)
    sources = tuple(getattr(p.run.data, part))
    name, role = _role(opened, part, data)
    return Evaluation(found.figures, found.report, found.samples, sources, name, role, found.examples)


def _part(own: config.Data, data: Sequence[str] | None, rows: Rows | None) -> Rows:
    """Returns the part of a run's data that is scored; `data` takes the place of the validation data."""
    if data and rows:
        raise ValueError("rows: is for the run's own data; leave it out, or `data`")
    if rows == "test" and not own.test:
        raise ValueError("rows: the run has no test data (data.test); name some with `data`")
    return "valid" if data else rows or ("test" if own.test else "valid")


def _role(p: Pretrained, part: Rows, data: Sequence[str] | None) -> tuple[str, str]:
    """Returns the name of the rows that are scored, and what they were to the run; empty: nothing is known of it."""
    run = p.source.run
    if run is None:
        return "data", ""
    if data:
        named = {_resolved(source) for source in data}
        if named & {_resolved(source) for source in run.data.train}:
            return "data", "the run was trained on them: their scores tell nothing"
        parts: tuple[Rows, ...] = ("valid", "test")
        part_of = [name for name in parts if named & {_resolved(source) for source in getattr(run.data, name)}]
        if not part_of:
            return "data", ""
        part = part_of[0]
    if not (p.source.path / "metrics.jsonl").is_file():  # a loop of the user's own trained it
        return part, "never seen" if part == "test" else "held out"
    return part, run_logs.role(run_logs.read(p.source.path), part)


def _resolved(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def sampling_for(place: Place, usual: int, tokens: int | None = None, **changes: Any) -> Sampling:
    """Returns how a model writes texts that are judged: as its files advise, with `changes`. The most new tokens are
    `tokens`, or else what the files say, or else the `usual` number. Tells what of the files is followed."""
    own = advice(source_of(place))
    if tokens is None and not own.followed.keys() & {"tokens", "length"}:
        tokens = usual
    how = own.chosen(**changes, **({} if tokens is None else {"tokens": tokens}))
    own.tell(how)
    return how


def evaluate_tasks(
    place: Place, tasks: Sequence[str], out: Path, *, step: int | None = None, shots: int | None = None,
    limit: int | None = None, folder: Path | None = None, chats: bool = False, rows: int = 16,
) -> tuple[dict[str, Any], str, dict[str, Sample]]:  # fmt: skip
    """Evaluates tasks of the lm-evaluation-harness; returns results, a table, and what each task's figures may be
    resampled from. `out` gets both, and every example with its answer."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("`tasks` needs the lm-evaluation-harness: pip install 'jaxlm[eval]'")
    p = open_model(place, step)
    s = p.source
    if chats and not s.templates:
        raise ValueError(f"{s.path}: the model has no chat template; leave out `chat`")
    if line := advice(s).line(Sampling()):
        print(f"{line}; the tasks' own settings stand before it, and nothing of it is used here", file=sys.stderr)
    with mesh.on_mesh(p.mesh):
        run = p.generator()
        lm = harness.Harness(
            p.model, run, run.prepare(p.params), p.tokens, p.boundary_ids, rows=rows, name=s.path.name,
            template=s.templates.get("default") if chats else None,
        )  # fmt: skip
        print(f"begin of text: {lm.bos_policy}")
        results = harness.evaluate(lm, tasks, shots=shots, limit=limit, folder=folder, chats=chats)
    if lm.scorer.truncated:
        print(
            f"{lm.scorer.truncated} contexts lost their beginning: the model has {lm.longest} places", file=sys.stderr
        )
    samples = results.pop("samples")
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: results[name] for name in ("results", "versions", "n-shot", "n-samples", "higher_is_better")}
    about = {"model": str(s.path), "begin_of_text": lm.bos_policy, "truncated": lm.scorer.truncated}
    (out / "results.json").write_text(json.dumps(about | kept, indent=1, default=str) + "\n")
    for task, examples in samples.items():
        lines = [json.dumps(e, default=str) for e in examples]
        (out / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    shown = harness.table(results)
    (out / "results.md").write_text(shown + "\n")
    return about | kept, shown, of_tasks(samples)


def evaluate_code(
    place: Place, source: str, out: Path, how: Sampling, ks: Sequence[int], *, step: int | None = None,
    weak: bool = False, seconds: float = 5.0, memory: int = 1 << 30, rows: int = 16,
) -> tuple[dict[str, Any], Sample]:  # fmt: skip
    """Computes pass@k of problems in HumanEval's format with `how.samples` answers each; returns results, and what they
    may be resampled from. Runs what the model writes, see `evaluation/sandbox`. `out` gets every answer and its result.
    """
    problems = pass_at_k.read(source)
    for k in ks:
        pass_at_k.pass_at_k(how.samples, 0, k)
    if how.temperature == 0 and how.samples > 1:
        raise ValueError("temperature: at 0 all samples are the same; raise it, or ask for `samples` 1")
    box, lacking = sandbox.opened(weak, seconds=seconds, memory=memory)
    for what in lacking:
        print(f"programs are not shut in: {what}", file=sys.stderr)
    p = open_model(place, step)
    texts: list[list[str]] = [[] for _ in problems]
    ids, sources = p.prompts([problem.prompt for problem in problems])
    with mesh.on_mesh(p.mesh):
        run = p.generator()
        weights, at_once = run.prepare(p.params), max(1, rows // how.samples)
        order = sorted(range(len(problems)), key=lambda i: -len(ids[i]))
        for at in range(0, len(order), at_once):
            members = order[at : at + at_once]
            for made in range(0, how.samples, rows):
                these = dataclasses.replace(how, samples=min(rows, how.samples - made), seed=how.seed + made)
                read = None if sources is None else [sources[i] for i in members]
                answers = stream.answers(run, p.tokens, weights, [ids[i] for i in members], these, read)
                for i, several in zip(members, answers, strict=True):
                    texts[i] += [answer.text for answer in several]
    judged = pass_at_k.judge(problems, texts, box, os.cpu_count() or 1)
    sample = pass_at_k.sample(problems, judged, ks)
    out.mkdir(parents=True, exist_ok=True)
    (out / "code.jsonl").write_text("\n".join(json.dumps(row) for row in judged) + "\n")
    figures = {name: float(value[0]) for name, value in sample.figures(sample.counts_NM.sum(0)[None]).items()}
    about: dict[str, Any] = dict(model=str(p.source.path), problems=len(problems), samples=how.samples)
    about |= dict(temperature=how.temperature, top_p=how.top_p)
    about |= dict(tokens=how.tokens, seed=how.seed, seconds=seconds, sandbox=lacking or "whole", figures=figures)
    return about, sample


def evaluate_texts(
    place: Place, metric: str, out: Path, how: Sampling, *, data: Sequence[str] | None = None, step: int | None = None,
    rows: Rows | None = None, limit: int | None = None, at_once: int = 32,
) -> tuple[dict[str, Any], str, Sample]:  # fmt: skip
    """Compares what the model writes with the true texts of `data`, or of the run's `rows` as in `evaluate`; returns
    results, how they were counted, and what they may be resampled from. `out` gets every text."""
    if metric not in text_metrics.METRICS:
        raise ValueError(f"metric: unknown {metric!r}{nearest(metric, text_metrics.METRICS)}")
    opened = open_model(place, step)
    path = opened.source.path
    # A published decoder is asked as a chat model, by its template or plainly.
    p = program(opened, data, "sft" if opened.model.family.kind == "decoder" else None)
    if not p.objective.reads_prompts:
        raise ValueError(f"metric: {path} learned no pairs of texts and no conversations; leave `metric` out")
    several = getattr(p.run.data, _part(p.run.data, data, rows))
    if not several:
        raise ValueError(f"metric: {path} has no validation data of its own; name some with `data`")
    name, role = _role(opened, _part(p.run.data, data, rows), data)
    prompts: list[list[int]] = []
    read: list[list[int]] = []
    true: list[str] = []
    for source in several:
        ids, sources, answers, notes = p.objective.read_prompts(source, room(how), opened.prompts)
        for note in notes:
            print(note)
        n = len(answers) if limit is None else limit
        prompts, read, true = prompts + ids[:n], read + (sources or [])[:n], true + answers[:n]
    written = _written(opened, prompts, read or None, how, at_once)
    scored = text_metrics.METRICS[metric](true, written)
    write_lines(out / "texts.jsonl", [dict(true=a, found=b) for a, b in zip(true, written, strict=True)])
    about = dict(model=str(path), rows=name, role=role, texts=len(true), tokens=how.tokens, beams=how.beams)
    about |= dict(counted=scored.about)
    return about | dict(figures=scored.figures), scored.about, scored.sample._replace(keys=true)


def _written(
    p: Pretrained, prompts: list[list[int]], read: list[list[int]] | None, how: Sampling, rows: int
) -> list[str]:
    """Returns the new text of each prompt; prompts of like length go together."""
    out = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len((read or prompts)[i]))
    with mesh.on_mesh(p.mesh):
        run = p.generator()
        weights = run.prepare(p.params)
        for at in range(0, len(order), rows):
            members = order[at : at + rows]
            filled = members + members[-1:] * (rows - len(members) if at else 0)  # so that nothing compiles anew
            inputs = None if read is None else [read[i] for i in filled]
            answers = stream.answers(run, p.tokens, weights, [prompts[i] for i in filled], how, inputs)
            for i, [answer] in zip(members, answers, strict=False):
                out[i] = answer.text
    return out


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def against(
    samples: dict[str, Sample], others: dict[str, Sample] | None, out: Path | None, resamples: int, seed: int,
    about: dict[str, Any],
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Returns intervals of the figures with their differences from another model's, and a table. `out` is a folder
    whose results.json gets them with what they are `about`."""
    record: dict[str, Any] = {"resamples": resamples, "seed": seed, "sizes": {}, "intervals": {}}
    shown = []
    for name, sample in samples.items():
        record["sizes"][name] = bootstrap.size(sample)
        record["intervals"][name] = bootstrap.intervals(sample, resamples, seed)
        if others is not None and (len(samples) == 1 or name != "losses"):
            if name not in others:
                raise ValueError(f"against: the other model has no {name} to compare; it was trained for another task")
            record.setdefault("differences", {})[name] = differences = bootstrap.paired(
                sample, others[name], resamples, seed
            )
            note = f"{name}: the same {record['sizes'][name]}, {resamples:,} paired resamples, seed {seed}"
            shown.append(bootstrap.table(differences, note))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(about | record, indent=1, default=str) + "\n")
    return record, "\n\n".join(shown)
