"""Chooses what of a model's weights stays, by the importance that is asked for, and takes the rest out."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import resized, unit_scores
from jaxlm.assembly.calibrated_program import CalibratedProgram
from jaxlm.assembly.open_model import Pretrained
from jaxlm.assembly.smaller_config import size_of
from jaxlm.core import spec, tree
from jaxlm.core.shrinking import Shrinking
from jaxlm.weights import matrices
from jaxlm.weights.grow import depth
from jaxlm.weights.shrink import choice, compensation, duplicates, importance, units
from jaxlm.weights.shrink.units import CHANNELS, Chosen, Sizes, Units


@dataclass(frozen=True)
class Made:
    """A Made is a smaller model before it is written."""

    config: Any
    weights: Any
    notes: list[str]
    kept: dict[str, Any]
    """What stays, for the record."""


class Maker:
    """A maker judges the units of a model once and takes out what goes."""

    def __init__(self, p: Pretrained, s: Shrinking, calibration: CalibratedProgram | None) -> None:
        self.p, self.s, self.c = p, s, calibration
        self.specs, self.model = p.model.specs, p.model
        self.weights = jax.tree.map(np.asarray, jax.device_get(p.params))
        self.found = matrices.matrices(p.model.family, p.model.config)
        self.notes: list[str] = []

    def make(self, c: Any) -> Made:
        """Returns the weights of the smaller model."""
        old: Any = self.model.config
        fields = {f.name for f in dataclasses.fields(old)}
        counts = {name: getattr(old, name) for name in fields & {"layers", "decoder_layers"}}
        deep = dataclasses.replace(c, **counts)
        specs = resized.specs_of(self.model.family, deep, self.p)
        changed = units.changes(self.specs, specs)
        self._merge(changed)
        chosen, squares, hessians = self._chosen(changed)
        plan = self._layers(c)
        weights = self.weights
        if self.s.compensate:
            weights = self._compensated(weights, chosen, hessians)
        weights = units.selected(self.specs, specs, weights, chosen)
        if CHANNELS in chosen:
            share = importance.energy(self.specs, self.weights, chosen[CHANNELS], squares)
            weights = importance.rescaled(self.specs, specs, weights, share, _offsets(self.specs))
            self.notes.append(f"width: the channels that stay hold {share:.1%} of the squares of the states")
        kept = {f"{u.place}{u.axis}": at.tolist() for u, at in chosen.items() if u.axis not in ("ffn", "embed")}
        made: Any = deep
        if plan is not None:
            made, weights = depth.config(deep, specs, plan), depth.weights(specs, weights, plan)
            kept |= {f"{stack} layers": list(layers.source) for stack, layers in plan.items()}
            self.notes += [f"{stack}: layers {', '.join(map(str, x.source))} stay" for stack, x in plan.items()]
        return Made(made, weights, self.notes, kept)

    def _merge(self, changed: Mapping[Units, Sizes]) -> None:
        """Lets units that others are copies of send on what those sent, which then can go without loss."""
        for one in changed:
            if one == CHANNELS:
                self.weights, n = duplicates.merged_channels(self.specs, self.weights, self.found)
            elif one.axis in ("heads", "ffn"):
                self.weights, n = duplicates.merged(self.specs, self.weights, one)
            else:
                continue
            if n:
                self.notes.append(f"{one.place}{one.axis}: {n} were copies of others, which now do their part")

    def _chosen(self, changed: Mapping[Units, Sizes]) -> tuple[Chosen, Any, dict[str, np.ndarray]]:
        """Returns the units that stay, the mean squares of what reads the residual stream, and Hessians by matrix."""
        inside = [one for one in changed if one.axis in ("heads", "ffn", "experts")]
        scores, squares, hessians = self._scores(inside, CHANNELS in changed)
        chosen = choice.choose(self.specs, changed, scores)
        return chosen, squares, hessians

    def _scores(self, inside: list[Units], width: bool) -> tuple[dict[Units, np.ndarray], Any, dict[str, np.ndarray]]:
        s, specs = self.s, self.specs
        sent = {one: units.ends(specs, one) for one in inside}
        wanted: dict[str, Any] = {}
        if s.compensate or s.importance == "activation":
            if any(one.axis == "experts" for one in inside) and s.importance == "activation":
                raise ValueError("importance: experts are judged by loss or magnitude alone; choose one of these")
            wanted = {path: self.found[path] for one in inside if one.axis != "experts" for path in sent[one]
                      if not self.found[path].experts}  # fmt: skip
        reading = importance.readers(self.found) if width and s.importance == "activation" else {}
        records: dict[str, Any] = {}
        last = None
        for several, hessian in ((wanted, s.compensate), (reading, False)):
            if several:
                assert self.c is not None
                found, last = unit_scores.recorded(self.c, self.weights, several, hessian)
                records |= found
        squares = {path: np.asarray(record.mean_square) for path, record in records.items()}
        seen = {path: squares[path] for path in reading} or None
        hessians = {path: np.asarray(records[path].hessian) for path in wanted} if s.compensate else {}
        if s.importance == "loss":
            assert self.c is not None
            by_units, by_channel = (
                unit_scores.products(self.c, self.weights, inside, width) if inside or width else ({}, {})
            )
            scores = {one: importance.by_products(specs, one, found) for one, found in by_units.items()}
            scores |= {CHANNELS: importance.by_products(specs, CHANNELS, by_channel)} if width else {}
        elif s.importance == "activation":
            scores = {one: importance.by_inputs(specs, self.weights, one, squares) for one in inside}
            scores |= {CHANNELS: importance.channels(specs, self.weights, self.found, seen, last)} if width else {}
        else:
            scores = {one: importance.by_weights(specs, self.weights, one) for one in inside}
            scores |= {CHANNELS: importance.channels(specs, self.weights, self.found)} if width else {}
        return scores, seen, hessians

    def _layers(self, c: Any) -> depth.Plan | None:
        """Returns which layers stay; None: all."""
        dropped: dict[str, set[int]] = {}
        for side in spec.sequences(self.specs):
            name = "decoder_layers" if side[0][0].startswith("decoder/") else "layers"
            total = sum(n for _, n in side)
            keep = size_of(c, name)
            keep = total if keep is None else keep
            if keep < len(side):
                raise ValueError(f"{name}: {keep} are too few; one of each of {len(side)} kinds of layers must stay")
            if keep < total:
                dropped |= self._least(side, total - keep)
        return unit_scores.without(self.specs, dropped) if dropped else None

    def _least(self, side: list[tuple[str, int]], n: int) -> dict[str, set[int]]:
        """Returns the `n` layers of a side that matter least; one of each stack stays."""
        if self.s.importance == "magnitude":
            scores = unit_scores.layers_by_weights(self.specs, self.weights, side)
        else:
            assert self.c is not None
            by_loss = self.s.importance == "loss"
            judge = unit_scores.layers_by_loss if by_loss else unit_scores.layers_by_influence
            scores = judge(self.c, self.weights, side)
        order = sorted((score, path, i) for path, values in scores.items() for i, score in enumerate(values))
        sizes, out = dict(side), {path: set[int]() for path, _ in side}
        for _, path, i in order:
            if sum(map(len, out.values())) < n and len(out[path]) + 1 < sizes[path]:
                out[path].add(i)
        return out

    def _compensated(self, weights: Any, chosen: Chosen, hessians: Mapping[str, np.ndarray]) -> Any:
        """Returns weights whose rows that stay make up for those that go."""
        missed = []
        for one, at in chosen.items():
            if one.axis not in ("heads", "ffn"):
                continue
            for path in units.ends(self.specs, one):
                if path not in hessians:
                    raise ValueError(f"compensate: inputs of {path} can't be recorded; leave it out")
                w = tree.at(weights, path).copy()
                L, each = len(w), int(np.prod(w.shape[2:-1]))  # the channels of a head, or 1
                flat = w.reshape(L, -1, w.shape[-1])
                for layer in range(L):
                    rows = (at[layer][:, None] * each + np.arange(each)).reshape(-1)
                    made, share = compensation.compensated(flat[layer], hessians[path][layer], rows)
                    flat[layer, rows] = made
                    missed.append(share)
                weights = tree.put(weights, path, flat.reshape(w.shape))
        if missed:
            self.notes.append(f"compensated: matrices miss {np.mean(missed):.2%} of the squares of their products")
        return weights


def _offsets(specs: Any) -> dict[str, float]:
    """Returns the norms by path, with what their scales count from: 1 where they begin at zero."""
    out = {}
    for path, s in tree.flatten(specs, spec.is_spec).items():
        if s.role == "norm" or s.silent == -1.0:
            out[path] = spec.counts_from(s)
    return out
