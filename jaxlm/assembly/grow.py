"""A trained model becomes a larger one that computes the same: a new run directory to start from, evaluate and export.

What is written is read again, and its logits are compared with those before.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import convert, moments, resized, run_directory
from jaxlm.assembly.open_model import Place, Pretrained, open_model
from jaxlm.core import config_io, spec, tree
from jaxlm.core.growth import Growth
from jaxlm.data import tokenizer as tokenizers
from jaxlm.models import MODELS
from jaxlm.nn.moe import Moe
from jaxlm.weights.grow import depth, experts, vocabulary, width

RECORD = "grown.json"


@dataclass(frozen=True)
class Grown:
    """A Grown is a model that has grown, before it is written."""

    config: Any
    weights: Any
    notes: list[str]
    tokens: Any = None
    """The new tokenizer; None: the model keeps its own."""
    outputs: int | None = None
    """How many of the last dimension's numbers are compared; None: all that there were."""
    keeps: bool = True
    """The function is kept."""
    new_layers: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    averages: moments.Grow = lambda averages, order: dict(averages)
    """Makes averages of gradients those of the larger model."""


def grow(model: Place, target: str | Path, growth: Growth, step: int | None = None) -> tuple[list[str], dict[str, Any]]:
    """Writes a run directory with the grown model; returns a line on each thing, and the record that it holds.

    ValueError: the model can't grow so, the function would not be kept, or `target` is there already.
    """
    folder = convert.fresh(target)
    config_io.check(growth, "")
    asked = [name for name in GROWTHS if getattr(growth, name)]
    if len(asked) != 1:
        also = f", not {' and '.join(asked)} together" if asked else ""
        raise ValueError(f"growth: give exactly one of {', '.join(GROWTHS)}{also}")
    if growth.noise and not growth.widen:
        raise ValueError("noise: only copies of widened layers can share unequally; leave it out, or give widen")
    with run_directory.removed_if_refused(folder):
        p = open_model(model, step)
        resized.check_plain(p, "grow")
        weights = jax.tree.map(np.asarray, jax.device_get(p.params))
        made = GROWTHS[asked[0]](p, weights, growth)
        known: tuple[Any, str] = (
            None,
            "moments: none, for an open model has none; a run from it begins with fresh ones",
        )
        if not isinstance(model, Pretrained):
            known = moments.grown(p.source, step, made.averages)
        return _write(p, folder, asked[0], made, *known)


# -------------------------------------------------------------------------------------------------------- the growths


def _blocks(p: Pretrained, weights: Any, growth: Growth) -> Grown:
    plan = depth.expansion(p.model.specs, growth.blocks)
    made = _layers(p, weights, plan)
    new = depth.new_layers(p.model.specs, plan)
    alone = f"to train them alone: --optim.only-layers {' '.join(map(str, sorted(set().union(*new.values()))))}"
    said = "; ".join(f"{side or 'layers'} {', '.join(map(str, at))}" for side, at in new.items())
    return dataclasses.replace(made, new_layers=new, notes=[f"new, from 0: {said}; they add nothing at first", alone])


def _stack(p: Pretrained, weights: Any, growth: Growth) -> Grown:
    made = _layers(p, weights, depth.repetition(p.model.specs, growth.stack))
    return dataclasses.replace(made, keeps=False, notes=["the stack was repeated, which changes the function"])


def _layers(p: Pretrained, weights: Any, plan: depth.Plan) -> Grown:
    c = depth.config(p.model.config, p.model.specs, plan)
    made = depth.weights(p.model.specs, weights, plan)
    return Grown(c, made, [], averages=lambda averages, order: depth.moments(averages, plan))


def _widen(p: Pretrained, weights: Any, growth: Growth) -> Grown:
    c: Any = p.model.config
    old, changes = p.model.specs, dict[str, Any]()
    for change in growth.widen:
        name, _, size = change.partition("=")
        if not size.isdecimal():
            raise ValueError(f"widen: {change!r} is not FIELD=N, such as ffn=4096")
        changes[name.removeprefix("model.")] = int(size)
    grown: Any = config_io.changed(c, changes, "model.")
    notes = []
    if grown.width != c.width and c.tied and c.head and not _heads(old):
        if not any(f.name == "tied" for f in dataclasses.fields(c)):
            raise ValueError("widen: the head of this family is always its embedding, so its width can't grow")
        grown = dataclasses.replace(grown, tied=False)
        notes.append("the head is no longer tied to the embedding")
    new = resized.specs_of(p.model.family, grown, p)
    if notes:
        old, weights = width.with_own_head(old, new, weights)
    sizes, parted = (c.width, grown.width), [*_heads(new), *_tables(new)] if notes else []

    def averages_of(averages: Mapping[str, np.ndarray], order: int) -> dict[str, np.ndarray]:
        # What a tied head learned, and the table, is one sum that can't be told apart.
        whole = {path: x for path, x in averages.items() if path not in parted}
        return width.moments(old, new, whole, sizes, order)

    made = width.widened(old, new, weights, sizes, growth.noise, growth.seed)
    return Grown(grown, made, notes, averages=averages_of)


def _tables(specs: Any) -> list[str]:
    return [path for path, s in tree.flatten(specs, spec.is_spec).items() if s.role == "table" and "vocab" in s.axes]


def _heads(specs: Any) -> list[str]:
    return [path for path, s in tree.flatten(specs, spec.is_spec).items() if s.role == "head" and "vocab" in s.axes]


def _experts(p: Pretrained, weights: Any, growth: Growth) -> Grown:
    c: Any = p.model.config
    if "ffn" not in {f.name for f in dataclasses.fields(c)} or c.moe is not None:
        raise ValueError("experts: this model's layers have no plain feed-forward network to copy")
    moe = Moe(experts=growth.experts, top_k=growth.top_k, ffn=c.ffn or 4 * c.width)
    name, fields = c.with_experts(moe)
    family = MODELS[name]
    grown = family.Config(**fields)
    specs = resized.specs_of(family, grown, p)
    made = experts.upcycled(p.model.specs, specs, weights, jax.random.key(growth.seed))
    notes = [f"family {name}: {moe.experts} experts a layer, {moe.top_k} for each token"]
    return Grown(grown, made, notes, averages=lambda averages, n: experts.moments(specs, averages, moe.top_k, n))


def _vocab(p: Pretrained, weights: Any, growth: Growth) -> Grown:
    c: Any = p.model.config
    tokens = None
    known, size, pieces = c.vocab, 0, dict[int, Sequence[int]]()
    if growth.vocab.isdecimal():
        size = int(growth.vocab)
        if size <= known:
            raise ValueError(f"vocab: the model has {known} rows already; give more, or a tokenizer that adds tokens")
    else:
        tokens, old = tokenizers.load(growth.vocab), p.tokens
        if p.objective is not None and p.objective.vocab_size > old.vocab_size:
            raise ValueError("vocab: this run's objective has tokens of its own behind the tokenizer's; give a number")
        known, pieces = old.vocab_size, _pieces(old, tokens, growth.vocab)
        size = max(c.vocab, tokens.vocab_size)
    grown = dataclasses.replace(c, vocab=size)
    specs = resized.specs_of(p.model.family, grown, p)
    made = vocabulary.with_rows(specs, weights, known, pieces)
    notes = [f"vocabulary: {c.vocab} rows became {size}; {len(pieces) or size - known} have a start of their own"]
    return Grown(
        grown, made, notes, tokens, outputs=known,
        averages=lambda averages, order: vocabulary.moments(specs, averages, pieces),
    )  # fmt: skip


def _pieces(old: Any, new: Any, place: str) -> dict[int, Sequence[int]]:
    """Returns the ids by which the old tokenizer writes each token that the new one adds. ValueError: the new one isn't
    the old one with more tokens."""
    differs = next((i for i in range(old.vocab_size) if i >= new.vocab_size or old.piece(i) != new.piece(i)), None)
    if differs is not None:
        raise ValueError(
            f"vocab: token {differs} of {place} differs from the model's own ({old.piece(differs)!r}); new tokens "
            "must come behind the old ones"
        )
    if new.vocab_size == old.vocab_size:
        raise ValueError(f"vocab: {place} has no token that the model's tokenizer lacks")
    return {i: old.encode(new.decode([i]) or new.piece(i)) for i in range(old.vocab_size, new.vocab_size)}


GROWTHS: dict[str, Callable[[Pretrained, Any, Growth], Grown]] = dict(
    blocks=_blocks, stack=_stack, widen=_widen, experts=_experts, vocab=_vocab
)


# -------------------------------------------------------------------------------------------------- writing and proof


def _write(
    p: Pretrained, folder: Path, kind: str, made: Grown, opt: Any, told: str
) -> tuple[list[str], dict[str, Any]]:
    """Writes the run directory, and the record of how its logits differ from those before. `opt`: what the optimizer
    remembers, or None, of which `told` says something. ValueError: the logits differ, though this growth keeps the
    function."""
    source = p.source
    notes = [*made.notes, *resized.write(p, folder, made.config, made.weights, {"grown": kind}, made.tokens, opt)]
    notes.append(told)
    batch = convert.probe(p)
    if made.outputs is not None:  # rows behind those of the old tokens are new, though the model had them
        batch = {name: x % made.outputs if name in ("tokens", "source") else x for name, x in batch.items()}
    before, after = convert.logits(p, batch=batch), convert.logits(open_model(folder), batch=batch)
    shown = made.outputs if made.outputs is not None and p.model.config.head else before.shape[-1]
    difference = convert.compare(before[..., :shown], after[..., :shown])
    if made.keeps and not difference["relative_difference"] <= convert.TOLERANCE["float32"]:
        raise ValueError(
            f"{kind}: {source.path.name} would not keep its function (logits off by "
            f"{difference['relative_difference']:.2g} of their deviation): its layers norm the residual stream "
            "itself, or scale it by its width; nothing was written"
        )
    record = {"source": source.path.name, "growth": kind, "keeps": made.keeps, **difference}
    record["moments"] = None if opt is None or source.run is None else source.run.optim.name
    record |= {"new_layers": made.new_layers} if made.new_layers else {}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return [*notes, f"{RECORD}: the comparison of logits before and after"], record
