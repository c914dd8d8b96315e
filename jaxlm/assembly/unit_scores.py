"""Runs a model over calibration text and scores what it can do without: units of its layers, channels, whole layers."""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly.calibrated_program import CalibratedProgram, shown
from jaxlm.assembly.program import Program
from jaxlm.core import spec, tree
from jaxlm.models.model import Model
from jaxlm.nn.block_stack import Window
from jaxlm.runtime import mesh
from jaxlm.weights.compress import recording, statistics
from jaxlm.weights.compress.statistics import Statistics
from jaxlm.weights.grow import depth
from jaxlm.weights.matrices import Matrix
from jaxlm.weights.shrink import importance
from jaxlm.weights.shrink.units import Units, ends, weights_of


def placed(p: Program, weights: Any) -> Any:
    """Returns weights on the program's devices, each of which has all of them."""
    return jax.device_put(weights, p.whole) if p.mesh is not None else jax.device_put(weights)


def recorded(
    c: CalibratedProgram, weights: Any, wanted: Mapping[str, Matrix], hessian: bool
) -> tuple[dict[str, Statistics], np.ndarray]:
    """Returns what was recorded of the inputs of matrices, on the host, and the mean squares `[D]` of the last states.

    ValueError: an input is NaN or infinite, or there is no text.
    """
    model = c.p.model

    @jax.jit
    def one(params: Any, batch: Any) -> Any:
        each = _counted(batch)
        by_path = {path: each["source" if _reads_source(path) else "tokens"] for path in wanted}
        states, found = recording.observe(
            lambda bound: model.forward(bound, batch).x_BTD, params, wanted, by_path, hessian=hessian
        )
        return found, Statistics.of(states, each["tokens"], hessian=False)

    merge = jax.jit(lambda a, b: jax.tree.map(Statistics.merge, a, b, is_leaf=lambda x: isinstance(x, Statistics)))
    total: Any = None
    with mesh.on_mesh(c.p.mesh):
        params = placed(c.p, weights)
        for batch in c.each("recording inputs"):
            found = one(params, batch)
            total = found if total is None else merge(total, found)
    found, last = jax.device_get(total)
    for path, record in found.items():
        statistics.check(record, path)
    statistics.check(last, "the last states")
    return found, np.asarray(last.mean_square)


def _counted(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns 1 for each token and 0 for padding, of a batch's two sides."""
    out = {}
    for name, segments in (("tokens", "segments"), ("source", "source_segments")):
        if name in batch:
            here = batch.get(segments)
            out[name] = jnp.ones(batch[name].shape) if here is None else (here > 0).astype(jnp.float32)
    return out


def _reads_source(path: str) -> bool:
    return path.startswith("encoder/") or path.rpartition("/")[2] in ("cross_k", "cross_v")


# ------------------------------------------------------------------------------------------------- losses, gradients


def _loss(p: Program, model: Model, weights: Any, batch: Any) -> jax.Array:
    """Returns the mean loss of a batch: of several losses the sum of their means."""
    totals = p.objective.totals(batch)
    sums = p.objective.loss(model, weights, batch, None)
    parts = [values["loss"] / jnp.maximum(totals[name], 1e-9) for name, values in sums.items()]
    return sum(parts, jnp.zeros(()))


def products(
    c: CalibratedProgram, weights: Any, of: Iterable[Units], channels: bool
) -> tuple[dict[Units, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns of each batch the products of weights and gradients that units send on with, by their matrices
    `[batches, L, N]`; and with `channels` those that write to each channel `[batches, D]`.

    ValueError: a gradient is NaN or infinite, or there is no text.
    """
    p, specs = c.p, c.p.model.specs
    sent = {units: {path: weights_of(specs, units)[path] for path in ends(specs, units)} for units in of}
    wrote = importance.writers(specs) if channels else {}
    paths = {path for several in sent.values() for path in several} | wrote.keys()

    @jax.jit
    def one(params: Any, batch: Any) -> Any:
        def loss(changed: dict[str, Any]) -> jax.Array:
            bound = params
            for path, w in changed.items():
                bound = tree.put(bound, path, w)
            return _loss(p, p.model, bound, batch)

        own = {path: tree.at(params, path) for path in sorted(paths)}
        product = {path: own[path] * g for path, g in jax.grad(loss)(own).items()}

        def summed(path: str, kept: set[int]) -> jax.Array:
            x = product[path]
            return x.sum(tuple(i for i in range(x.ndim) if i not in kept))

        by_units = {units: {path: summed(path, {0, dim}) for path, dim in several.items()}
                    for units, several in sent.items()}  # fmt: skip
        return list(by_units.values()), {path: summed(path, {dim}) for path, dim in wrote.items()}

    with mesh.on_mesh(p.mesh):
        params = placed(p, weights)
        found = [jax.device_get(one(params, batch)) for batch in c.each("gradients")]
    by_units, by_channel = jax.tree.map(lambda *x: np.stack(x), *found)
    for path, x in {**{k: v for d in by_units for k, v in d.items()}, **by_channel}.items():
        if not np.isfinite(x).all():
            raise ValueError(f"calibration: gradients of {path} are NaN or infinite; check the model on this text")
    return dict(zip(sent, by_units, strict=True)), by_channel


# ------------------------------------------------------------------------------------------------------- whole layers


def _kept(specs: Any, kept: Mapping[str, list[int]]) -> depth.Plan:
    """Returns the plan that keeps layers of some stacks, and all of the others."""
    return {
        path: depth.Layers(tuple(at), (False,) * len(at))
        for side in spec.sequences(specs) for path, n in side
        for at in [kept.get(path, list(range(n)))]
    }  # fmt: skip


def without(specs: Any, dropped: Mapping[str, set[int]]) -> depth.Plan:
    """Returns the plan of a model without some layers of its stacks."""
    sizes = {path: n for side in spec.sequences(specs) for path, n in side}
    return _kept(specs, {path: [i for i in range(n) if i not in dropped.get(path, ())] for path, n in sizes.items()})


def _planned(p: Program, weights: Any, plan: depth.Plan) -> tuple[Model, Any]:
    """Returns the model with the layers of a plan, and its weights."""
    m = p.model
    c = depth.config(m.config, m.specs, plan)
    heads = {name: s for name, s in m.specs.items() if name not in p.adapter.base}
    model = dataclasses.replace(m, config=c, specs=m.family.specs(c) | heads)
    return model, depth.weights(m.specs, weights, plan)


def layers_by_loss(c: CalibratedProgram, weights: Any, side: list[tuple[str, int]]) -> dict[str, np.ndarray]:
    """Returns the mean loss of the model without each layer, by stack; infinite for the only layer of a stack.

    ValueError: a loss is NaN, or there is no text.
    """
    specs, compiled = c.p.model.specs, dict[str, Any]()
    out = {path: np.full(n, np.inf) for path, n in side}
    candidates = [(path, i) for path, n in side if n > 1 for i in range(n)]
    with mesh.on_mesh(c.p.mesh):
        batches = list(c.each("reading"))
        for path, i in shown(candidates, "losses without each layer"):
            model, made = _planned(c.p, weights, without(specs, {path: {i}}))
            run = compiled.setdefault(repr(model.config), jax.jit(partial(_loss, c.p, model)))
            params = placed(c.p, made)
            out[path][i] = np.mean([float(run(params, batch)) for batch in batches])
    for path, values in out.items():
        if np.isnan(values).any():
            raise ValueError(f"calibration: the loss without a layer of {path} is NaN; check the model on this text")
    return out


def layers_by_influence(c: CalibratedProgram, weights: Any, side: list[tuple[str, int]]) -> dict[str, np.ndarray]:
    """Returns each layer's block influence (Men et al. 2024) by stack: 1 minus the cosine of the states before and
    after it, a mean over tokens. ValueError: states are NaN or infinite, or there is no text."""
    run = jax.jit(partial(_turned, c.p.model, dict(side)))
    with mesh.on_mesh(c.p.mesh):
        params = placed(c.p, weights)
        found = [jax.device_get(run(params, batch)) for batch in c.each("influence of layers")]
    sums, totals = jax.tree.map(lambda *x: np.sum(x, 0, dtype=np.float64), *found)
    for path in sums:
        if not np.isfinite(sums[path]).all():
            raise ValueError(f"calibration: states of {path} are NaN or infinite; check the model on this text")
    return {path: sums[path] / max(float(totals[path]), 1.0) for path in sums}


def _turned(model: Model, wanted: Mapping[str, int], params: Any, batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the sums over tokens of how far each layer of some stacks turns the states, and the numbers of tokens.

    The model is run layer by layer: what stands before the stack is computed anew each time, and dropped by the
    compiler.
    """
    order = [(path, n) for side in spec.sequences(model.specs) for path, n in side]
    ended: dict[str, Any] = {}

    def through(path: str, window: Window) -> Window:
        """Runs the model with one window that does something; stacks before it have ended, those behind do nothing."""
        bound = params
        for other, _ in order:
            bound = tree.put(bound, other, window if other == path else Window(x=ended.get(other)))
        model.forward(bound, batch)
        return window

    sums, totals, each = dict[str, Any](), dict[str, Any](), _counted(batch)
    for path, n in order:
        x = through(path, Window()).entered
        own = tree.at(params, path)
        count_BT = each["source" if _reads_source(path) else "tokens"]
        turned = []
        for i in range(n):
            layer = jax.tree.map(lambda w, i=i: w[i], own)
            after = through(path, Window(layers=(layer,), first=i, x=x)).left
            a, b = (jax.tree.leaves(y)[0].astype(jnp.float32) for y in (x, after))
            lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
            turned.append(((1 - (a * b).sum(-1) / jnp.maximum(lengths, 1e-12)) * count_BT).sum())
            x = after
        ended[path] = x
        if path in wanted:
            sums[path], totals[path] = jnp.stack(turned), count_BT.sum()
    return sums, totals


def layers_by_weights(specs: Any, weights: Any, side: list[tuple[str, int]]) -> dict[str, np.ndarray]:
    """Returns the norm of the matrices by which each layer writes to the residual stream, by stack."""
    out = {}
    for path, n in side:
        sent = [w for w in importance.writers(specs) if w.startswith(f"{path}/")]
        out[path] = np.sqrt(sum(np.square(tree.at(weights, w).astype(np.float64)).reshape(n, -1).sum(1) for w in sent))
    return out
