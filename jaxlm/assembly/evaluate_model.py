"""A model is evaluated, whatever its format: on validation data, public tasks, programs it writes, or texts."""

import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.assembly import corpus as corpora
from jaxlm.assembly.generation_advice import advice
from jaxlm.assembly.open_model import Place, Pretrained, open_model, program, source_of
from jaxlm.core.errors import nearest
from jaxlm.evaluation import bootstrap, harness, pass_at_k, perplexity, sandbox, task_scores, text_metrics
from jaxlm.evaluation.bootstrap import Sample
from jaxlm.evaluation.samples import is_loss, keyed, of_losses, of_tasks
from jaxlm.inference import stream
from jaxlm.inference.sampling import Sampling, room
from jaxlm.objectives import OBJECTIVES
from jaxlm.runtime import mesh


class Evaluation(NamedTuple):
    """An `Evaluation` holds the result of one."""

    figures: dict[str, float]
    report: str
    """The report on predictions, where the objective makes them."""
    samples: dict[str, Sample]
    """The samples that the figures may be resampled from."""
    data: tuple[str, ...]
    """Validation sources; empty: held out of the run's training data."""
    examples: list[dict[str, Any]]
    """The true and the predicted answer of each example, where the objective makes predictions."""


def evaluate(
    place: Place, *, data: Sequence[str] | None = None, step: int | None = None, batches: int = 0
) -> Evaluation:
    """Evaluates on the validation data of the run, or on `data`; on `batches` of each source if not 0."""
    if batches < 0:
        raise ValueError(f"batches: {batches} is out of range; give 1 or more, or 0 for all")
    opened = open_model(place, step)
    settings = None if opened.source.is_trained_here else opened.source.objective
    if settings is not None and data:  # what a published head leaves open
        settings = OBJECTIVES.of(settings).infer_from_data(settings, data)
    p = program(opened, data, settings=settings)
    corpus = corpora.corpus(p.run.data, p.objective)
    keys: list[int] = []
    with mesh.on_mesh(p.mesh):
        eval_step = perplexity.make_eval_step(p.loss, p.objective.totals, p.tokens.bytes_per_token)
        inputs = keyed(corpora.validation_batches(p, corpus, batches), keys)
        parts = perplexity.parts(eval_step, opened.params, inputs)
        samples = {"losses": of_losses(parts, keys, whole=not p.objective.predicts)}
        result = Evaluation(perplexity.total(parts), "", samples, tuple(p.run.data.valid), [])
        if not p.objective.predicts:
            return result
        records = [record for part in corpus.valid for record in part]
        predictions = corpora.predictions(p, opened.params, records)
    true, predicted = p.objective.answers(records, predictions)
    judged = task_scores.judge(p.objective.prediction.scores, p.run.objective, records, true, predicted)
    # The task's own scores come first. Accuracy and perplexity of tokens would only be taken for them.
    figures = judged.figures | {name: value for name, value in result.figures.items() if is_loss(name)}
    samples = {"answers": judged.sample} | samples
    return result._replace(figures=figures, report=judged.report, samples=samples, examples=judged.examples)


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
    limit: int | None = None, rows: int = 32,
) -> tuple[dict[str, Any], str, Sample]:  # fmt: skip
    """Compares what the model writes with the true texts of `data`, or of the run's validation data; returns results,
    how they were counted, and what they may be resampled from. `out` gets every text."""
    if metric not in text_metrics.METRICS:
        raise ValueError(f"metric: unknown {metric!r}{nearest(metric, text_metrics.METRICS)}")
    opened = open_model(place, step)
    path = opened.source.path
    # A published decoder is asked as a chat model, by its template or plainly.
    p = program(opened, data, "sft" if opened.model.family.kind == "decoder" else None)
    if not p.objective.reads_prompts:
        raise ValueError(f"metric: {path} learned no pairs of texts and no conversations; leave `metric` out")
    if not p.run.data.valid:
        raise ValueError(f"metric: {path} has no validation data of its own; name some with `data`")
    prompts: list[list[int]] = []
    read: list[list[int]] = []
    true: list[str] = []
    for source in p.run.data.valid:
        ids, sources, several, notes = p.objective.read_prompts(source, room(how), opened.prompts)
        for note in notes:
            print(note)
        n = len(several) if limit is None else limit
        prompts, read, true = prompts + ids[:n], read + (sources or [])[:n], true + several[:n]
    written = _written(opened, prompts, read or None, how, rows)
    scored = text_metrics.METRICS[metric](true, written)
    write_lines(out / "texts.jsonl", [dict(true=a, found=b) for a, b in zip(true, written, strict=True)])
    about = dict(model=str(path), texts=len(true), tokens=how.tokens, beams=how.beams, counted=scored.about)
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
        record["sizes"][name] = f"{len(sample.counts_NM)} {sample.unit}"
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
