"""Compares a model that was made small with what it was: bytes, losses and scores, the divergence of its predictions,
and tokens a second, each with an interval; as a record, and as a table for people."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly import choices, scoring
from jaxlm.assembly import corpus as corpora
from jaxlm.assembly.evaluate_model import evaluate
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.open_model import Pretrained, open_model, program, specs_of
from jaxlm.assembly.program import Program
from jaxlm.core import spec
from jaxlm.core.compress_request import Comparison
from jaxlm.evaluation import bootstrap
from jaxlm.evaluation.bootstrap import Sample
from jaxlm.formats.checkpoint import Checkpoints
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.nn import losses
from jaxlm.nn.kernels import few_bit_matmul
from jaxlm.objectives import OBJECTIVES, outputs
from jaxlm.runtime import mesh

PROMPT, NEW, REPEATS = 16, 64, 5  # tokens before and of an answer that is timed, and how often
SHOWN = ("perplexity", "bits_per_byte", "loss", "accuracy", "f1", "f1_macro", "exact")


def compare(source: Source, small: Source, c: Comparison, step: int | None = None) -> dict[str, Any]:
    """Returns what is known of a model, of its checkpoint `step` if given, and of the small one. Nothing is evaluated
    of a model without data of its own where none is named, or without a head."""
    record: dict[str, Any] = {"bytes_on_disk": [on_disk(s) for s in (source, small)],
                              "bytes_in_memory": [in_memory(s) for s in (source, small)]}  # fmt: skip
    if c.compare == "sizes":
        return record
    before, after = open_model(source, step), open_model(small)
    if (c.data or before.source.is_trained_here) and _has_head(before):
        record |= _quality(before, after, c)
    if c.compare == "all" and before.model.family.generates:
        record["decode"] = decode_speeds([before, after])
    return record


def _has_head(p: Pretrained) -> bool:
    """Says whether the model predicts anything that can be scored."""
    own = p.source.objective
    return p.model.config.head or bool(own and OBJECTIVES.of(own).specs(own, p.model.config.width))


def on_disk(s: Source) -> int:
    """Returns the bytes of the files that hold a model's weights."""
    path = s.path
    if path.is_file():
        return path.stat().st_size
    files = list(path.glob("*.safetensors"))
    if s.run is not None:
        with Checkpoints(path / "checkpoints") as checkpoints:
            files = [f for f in (checkpoints.path(checkpoints.latest() or 0) / "params").rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def in_memory(s: Source) -> int:
    """Returns the bytes of a model's weights as they are used."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(spec.abstract(specs_of(s))))


def _quality(before: Pretrained, after: Pretrained, c: Comparison) -> dict[str, Any]:
    """Returns losses and scores of both with their difference, and the divergence of their predictions."""
    data = c.data or None
    old, new = (evaluate(p, data=data, batches=c.batches, window=c.window) for p in (before, after))
    figures: dict[str, Any] = {}
    for name, sample in new.samples.items():
        figures |= bootstrap.paired(sample, old.samples[name])
    settings = None if before.source.is_trained_here else before.source.objective
    if settings is not None and data:
        settings = OBJECTIVES.of(settings).infer_from_data(settings, data)
    p = program(before, data, settings=settings, window=c.window)
    part: Any = "valid" if data else new.part
    held = scoring.HeldOut(p, getattr(corpora.corpus(p.run.data, p.objective, (part,)), part))
    rows: dict[str, Any] = {"batches": c.batches, "part": new.part, "window": p.run.train.seq_len,
            "sources": [Path(s).name for s in new.data]}  # fmt: skip
    found: dict[str, Any] = {"evaluated": rows, "figures": figures}
    if (rowwise := predictions(p, held, before, after, c.batches)) is not None:
        ends = bootstrap.intervals(rowwise)
        whole = rowwise.figures(rowwise.counts_NM.sum(0)[None])
        found["predictions"] = {n: {"value": float(v[0]), "interval": ends.get(n)} for n, v in whole.items()}
        found["predictions"]["rows"] = len(rowwise.counts_NM)
    return found


def predictions(
    p: Program, held: scoring.HeldOut, before: Pretrained, after: Pretrained, batches: int = 0
) -> Sample | None:
    """Returns by rows how far predictions are from those before: KL(before ‖ after) in nats, the share of places with
    the same likeliest class, and for a vocabulary both perplexities. None: they can't be compared."""
    if p.objective.objective.outputs is None:
        return None
    shard = before.model.shard

    def likelihoods(o: outputs.Predicted, targets: jax.Array) -> jax.Array:
        if not isinstance(o.logits, losses.Readout):
            return jnp.zeros_like(o.weights_BN)
        return losses.log_likelihoods(o.logits, targets, shard=shard)

    @jax.jit
    def sums(old: Any, new: Any, batch: Any) -> jax.Array:
        rows = jax.tree.map(lambda x: x[0], batch)
        a, b = (p.objective.outputs(q.model, w, rows) for q, w in ((before, old), (after, new)))
        apart = outputs.divergence(a, b, outputs.Measure(), shard)
        each = [apart, outputs.same_top(a, b, shard), jnp.ones_like(a.weights_BN)]
        if "targets" in rows and rows["targets"].shape == a.weights_BN.shape:
            each += [likelihoods(o, rows["targets"]) for o in (a, b)]
        weighed = jnp.stack([x * a.weights_BN for x in each], -1)
        texts_share_rows = "rows" in rows and rows["rows"].ndim == 2  # and each is an example by itself
        return weighed.reshape(-1, len(each)) if texts_share_rows else weighed.sum(1)

    with mesh.on_mesh(p.mesh):
        found = [np.asarray(sums(before.params, after.params, batch)) for batch in held.batches(p, batches)]
    counts = np.concatenate(found).astype(np.float64)
    counts = counts[counts[:, 2] > 0]

    def figures(s: np.ndarray) -> dict[str, np.ndarray]:
        out = dict(kl=s[:, 0] / s[:, 2], same_top=s[:, 1] / s[:, 2])
        if s.shape[1] > 3 and s[:, 3].any():
            old, new = (np.exp(-s[:, i] / s[:, 2]) for i in (3, 4))
            out |= dict(perplexity_before=old, perplexity=new, perplexity_change=new / old - 1)
        return out

    return Sample(counts, figures, unit="rows")


def decode_speeds(models: Sequence[Pretrained]) -> dict[str, Any]:
    """Returns tokens a second of writing one text greedily, of each model: the median and the least and most of some
    repeats, which take turns so that what else the machine does meets all models."""
    places = models[0].model.config.positions or PROMPT + NEW
    before = min(PROMPT, places // 4)
    new = min(NEW, places - before)
    ids = [list(np.random.default_rng(0).integers(1, models[0].model.config.vocab, before))]
    how = Sampling(tokens=new, temperature=0.0)
    made: list[list[float]] = [[] for _ in models]
    runs = []
    for p in models:
        with mesh.on_mesh(p.mesh):
            run = Generator(p.model, (), p.model.config.vocab)
            weights = run.prepare(p.params)
            run(weights, ids, how)  # compiles
            runs.append((run, weights))
    for _ in range(REPEATS):
        for times, p, (run, weights) in zip(made, models, runs, strict=True):
            with mesh.on_mesh(p.mesh):
                began = time.perf_counter()
                run(weights, ids, how)
                times.append(new / (time.perf_counter() - began))
    small = any(p.source.run is not None and choices.has_few_bits(p.source.run) for p in models)
    each = [{"tokens_per_second": statistics.median(t), "range": [min(t), max(t)]} for t in made]
    return {"prompt": before, "new": new, "repeats": REPEATS, "device": jax.devices()[0].device_kind,
            "few_bits": few_bit_matmul.choose().description if small else "", "models": each}  # fmt: skip


def lines(record: Mapping[str, Any]) -> list[str]:
    """Returns the table as Markdown."""
    out = ["| | before | after |", "|---|---|---|"]

    def row(name: str, *cells: str) -> None:
        out.append(f"| {name} | {' | '.join(cells)} |")

    for name, key in (("bytes on disk", "bytes_on_disk"), ("bytes in memory", "bytes_in_memory")):
        row(name, *(f"{n:,}" for n in record[key]))
    by_rows = record.get("predictions", {})
    for name, f in record.get("figures", {}).items():
        if name == "perplexity" and "perplexity" in by_rows:  # a single document has no interval, its rows have
            row(name, *(f"{x['value']:.5g}{_ends(x['interval'])}"
                        for x in (by_rows["perplexity_before"], by_rows["perplexity"])))  # fmt: skip
        elif name.rpartition("/")[2] in SHOWN:
            row(name, f"{f['against']:.5g}{_ends(f['against_interval'])}", f"{f['value']:.5g}{_ends(f['interval'])}")
    if by_rows:
        kl, top = by_rows["kl"], by_rows["same_top"]
        row("KL to before, nats", "0", f"{kl['value']:.4g}{_ends(kl['interval'])}")
        row("same likeliest token", "100 %", f"{top['value']:.2%}{_ends(top['interval'], '.2%')}")
    if "decode" in record:
        row("decoded tokens/s", *(f"{m['tokens_per_second']:.3g}{_ends(m['range'], '.3g')}"
                                  for m in record["decode"]["models"]))  # fmt: skip
    out.append("")
    if record.get("decode", {}).get("few_bits"):
        out += [f"In writing, matrices of int8 and int4 are {record['decode']['few_bits']}.", ""]
    if "evaluated" in record:
        e = record["evaluated"]
        some = f"{e['batches']} batches" if e["batches"] else "all"
        out.append(f"Evaluated on {some} of {', '.join(e['sources']) or 'the run’s own data'} in windows of "
                   f"{e['window']} tokens; in brackets 95 % intervals (bootstrap), of speeds the least and most of "
                   f"{REPEATS}.")  # fmt: skip
    else:
        out.append("Not evaluated: not asked for, or the model has no head, or no data of its own and none was named.")
    return out


def _ends(interval: Sequence[float] | None, form: str = ".5g") -> str:
    return "" if not interval else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
