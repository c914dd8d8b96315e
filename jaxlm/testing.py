"""The laws that every model, objective and adapter keeps, for those of other packages: call these in your own tests.

    from jaxlm.testing import check_family
    def test_my_model(): check_family(my_model, my_model.Config(layers=2, width=16))

Each function returns the names of the laws that it checked; a law that is broken is an AssertionError that names it.
Use settings as small as they come: some programs are compiled.
"""

import dataclasses
import json
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly.run_objective import BoundObjective, row_shape
from jaxlm.core import config, spec, tree
from jaxlm.core.batch import Batch
from jaxlm.data.tokenizer import Bytes
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.family import Family, ModelConfig
from jaxlm.nn.layout import Layout
from jaxlm.objectives.objective import Objective
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh
from jaxlm.weights.adapters.adapted import Adapted
from jaxlm.weights.adapters.method import Method

T, ROWS = 12, 8  # of batches
CLOSE = dict(atol=5e-5, rtol=1e-3)


def check_family(
    family: Family, c: ModelConfig, *, mesh: config.Mesh | None = None, tolerance: float = 1.0
) -> list[str]:
    """Checks a family with a small configuration: what `specs` says of its weights, causality, packed = alone, cached =
    at once, scanned = unrolled, and a mesh = one device where there are several: `mesh`, by default `fsdp` over all.
    `tolerance` multiplies what results may differ by."""
    close: Any = {name: value * tolerance for name, value in CLOSE.items()}
    values = dataclasses.asdict(c)  # type: ignore[call-overload]
    assert json.loads(json.dumps(values)) == _as_json(values), "settings: not all values are JSON's own"
    specs = family.specs(c)
    for path, s in tree.flatten(specs, spec.is_spec).items():
        assert len(s.shape) == len(s.axes), f"specs: {path} has {len(s.shape)} dimensions and {len(s.axes)} axes"
    weights = _weights(specs)
    batch = _batch(family, c)
    unrolled = _model(family, c, scan=False)
    run = jax.jit(partial(_logits, unrolled))
    whole = np.asarray(run(weights, batch))
    assert np.isfinite(whole).all() and whole.shape[:2] == (ROWS, T), f"forward: logits {whole.shape} are not finite"
    laws = ["settings are JSON", "specs", "logits are finite"]
    if family.generates:
        changed = batch["tokens"].copy()
        changed[:, T // 2] = (changed[:, T // 2] + 1) % c.vocab
        other = np.asarray(run(weights, batch | {"tokens": changed}))
        np.testing.assert_allclose(other[:, : T // 2], whole[:, : T // 2], **close, err_msg="a position sees the next")
        assert np.abs(other[:, T // 2 :] - whole[:, T // 2 :]).max() > 1e-4, "a token changes nothing"
        laws.append("causality")
    packed, alone = _documents(batch)
    second = np.asarray(run(weights, packed))[:, T // 2 :]
    np.testing.assert_allclose(np.asarray(run(weights, alone))[:, : T // 2], second, **close, err_msg="packed = alone")
    laws.append("packed = alone")
    if family.generates:
        _check_cache(unrolled, weights, batch, whole, close)
        laws.append("cached = at once")
    expected = jax.jit(jax.value_and_grad(partial(_loss, unrolled)))(weights, batch)
    looped = jax.jit(jax.value_and_grad(partial(_loss, _model(family, c, scan=True, remat="full"))))(weights, batch)
    _assert_equal(looped, expected, "scanned and rematerialized = unrolled", tolerance)
    laws.append("scanned and rematerialized = unrolled")
    if jax.device_count() > 1:
        _check_mesh(family, c, mesh, weights, batch, expected, tolerance)
        laws.append("a mesh = one device")
    return laws


def check_objective(
    objective: Objective, settings: Any, records: Sequence[Any], family: Family, c: ModelConfig, *,
    tokenizer: Any = None, seq_len: int = 32,
) -> list[str]:  # fmt: skip
    """Checks an objective on a small model, with records as its `example` takes them (four or more, and the model's
    vocabulary as large as the tokenizer's; by default bytes): rows of one shape with documented keys, the same from the
    same seed, losses that are sums over rows, rows of padding that add nothing, and weights of its own that learn."""
    reader: Any = tokenizer or Bytes()
    task = BoundObjective(objective, settings, reader, row_shape(seq_len, c))
    task.check()
    make: Callable[[int], dict[str, Any]] = lambda i: dict(  # noqa: E731
        task.example(records[i % len(records)], np.random.default_rng(i))
    )
    rows = [make(i) for i in range(4)]
    shapes = [{name: (x.shape, x.dtype.name) for name, x in row.items()} for row in rows]
    assert all(shape == shapes[0] for shape in shapes), f"example: rows are not of one shape: {shapes}"
    assert set(shapes[0]) <= set(Batch.__annotations__), (
        f"example: unknown keys {sorted(set(shapes[0]) - set(Batch.__annotations__))}; see jaxlm.core.batch"
    )
    for name, x in make(0).items():
        np.testing.assert_array_equal(x, rows[0][name], err_msg=f"example: {name} differs with the same seed")
    assert pickle.loads(pickle.dumps(task)).name == task.name, "the bound objective can't be sent to loader workers"
    heads = task.specs(c.width)
    specs = family.specs(c) | heads
    model = Model(family, c, specs, Layout(execution=config.Execution(dtype="float32", scan=True)))

    @jax.jit
    def step(weights: Any, batch: Any) -> Any:
        def value(weights: Any) -> Any:
            sums = task.loss(model, weights, batch, None)
            return sum(part["loss"] for part in sums.values()), (sums, task.totals(batch))

        (_, aux), gradients = jax.value_and_grad(value, has_aux=True)(weights)
        return aux, gradients

    weights = _weights(specs)
    (sums, totals), gradients = step(weights, _stacked(rows))
    assert set(sums) == set(totals), f"loss gives sums {sorted(sums)}, and totals {sorted(totals)}"
    assert all(np.isfinite(x) for x in jax.tree.leaves((sums, totals))), "loss: not finite"
    assert all(float(x) > 0 for x in totals.values()), "totals: nothing is learned from these records"
    idle = [name for name in heads if not np.abs(gradients[name]).max() > 0]
    assert not idle, f"specs: weights that learn nothing: {idle}"
    blank = {name: np.zeros_like(x) for name, x in rows[0].items()}
    parts = [step(weights, _stacked([row, blank, blank, blank]))[0] for row in rows]
    added = jax.tree.map(lambda *x: sum(map(float, x)), *parts)
    same = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3, err_msg="sums over rows, padding adds nothing")
    jax.tree.map(same, jax.tree.map(float, (sums, totals)), added)
    return ["rows of one shape", "the same from the same seed", "workers", "losses are sums", "own weights learn"]


def check_adapter(method: Method[Any], settings: config.Adapter, family: Family, c: ModelConfig) -> list[str]:
    """Checks a method of fine-tuning on a small model: it begins as the base (but for virtual tokens and keys), every
    trained weight gets a gradient, no other is trained, and merged weights compute the same where the method says that
    they can."""
    a = Adapted(settings, family, c)
    specs = a.specs()
    base = Model(family, c, a.base, Layout(execution=config.Execution(dtype="float32", scan=True)))
    model = dataclasses.replace(base, adapter=a)
    batch = _batch(family, c)
    fresh = jax.jit(partial(a.init, specs))(jax.random.key(0))
    flat, abstract = tree.flatten(fresh), tree.flatten(spec.abstract(specs))
    assert {p: x.shape for p, x in flat.items()} == {p: x.shape for p, x in abstract.items()}, "init: other shapes"
    own = {name: w for name, w in fresh.items() if name != "adapter"}
    laws = ["shapes are those of the specs"]
    run = jax.jit(partial(_logits, model))
    takes_part_at_once = method.virtual_tokens is not None or method.num_common_keys(settings) > 0
    if not takes_part_at_once:
        np.testing.assert_allclose(
            run(fresh, batch), jax.jit(partial(_logits, base))(own, batch), atol=1e-3, err_msg="fresh = base"
        )
        laws.append("fresh = base")
    rng = np.random.default_rng(0)
    moved = tree.map_named(
        lambda path, x: x + rng.normal(0, 0.1, x.shape).astype(np.float32) if a.trainable(path) else x, fresh
    )
    trainable, frozen = tree.partition(moved, a.trainable)
    assert jax.tree.leaves(trainable), "no weight is trained"
    gradients = jax.jit(jax.grad(lambda p: _loss(model, tree.merge(p, frozen), batch)))(trainable)
    idle = [path for path, g in tree.flatten(gradients).items() if not np.abs(g).max() > 0]
    assert not idle, f"trained weights without a gradient: {idle}"
    laws.append("every trained weight learns")
    if method.mergeable and not takes_part_at_once and settings.base == "float32":
        merged = jax.jit(a.merged)(moved)
        same = jax.jit(partial(_logits, base))(merged, batch)
        np.testing.assert_allclose(same, run(moved, batch), atol=1e-3, rtol=1e-3, err_msg="merged = bound")
        laws.append("merged = bound")
    return laws


def _as_json(value: Any) -> Any:
    """Returns a value as it comes back from JSON: tuples are lists."""
    if isinstance(value, dict):
        return {name: _as_json(x) for name, x in value.items()}
    return [_as_json(x) for x in value] if isinstance(value, list | tuple) else value


def _weights(specs: Any) -> Any:
    """Draws weights of the usual size, with no bias of zero and no scale of one."""
    rng = np.random.default_rng(0)

    def one(s: spec.Spec) -> np.ndarray:
        size = {"norm": 0.2, "table": 0.5}.get(s.role, 0.3)
        return (rng.normal(0, size, s.shape) + (s.role == "norm")).astype(np.float32)

    return jax.tree.map(one, specs, is_leaf=spec.is_spec)


def _batch(family: Family, c: ModelConfig) -> dict[str, np.ndarray]:
    rng, positions = np.random.default_rng(1), np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    draw: Callable[[], np.ndarray] = lambda: rng.integers(0, c.vocab, (ROWS, T)).astype(np.int32)  # noqa: E731
    batch = dict(tokens=draw(), positions=positions, segments=np.ones((ROWS, T), np.int32))
    if family.kind == "encoder_decoder":
        batch |= dict(source=draw(), source_positions=positions, source_segments=batch["segments"])
    return batch


def _documents(batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns rows of two documents each, and rows of which each has the second of them alone at its beginning."""
    half, packed, alone = T // 2, dict(batch), {}
    for name in batch:
        if name.endswith("positions"):
            packed[name] = batch[name] % half
        elif name.endswith("segments"):
            packed[name] = np.repeat(batch[name][:, :half], 2, 1) * np.repeat(np.array([1, 2], np.int32), half)
    for name, x in packed.items():
        alone[name] = x
        if name in ("tokens", "source"):
            alone[name] = np.roll(x, half, 1)
        elif name.endswith("segments"):
            alone[name] = np.where(x == 1, 1, 0).astype(np.int32)
    return packed, alone


def _stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _model(family: Family, c: ModelConfig, **execution: Any) -> Model:
    return Model(family, c, family.specs(c), Layout(execution=config.Execution(dtype="float32", **execution)))


def _logits(model: Model, weights: Any, batch: Any) -> jax.Array:
    return losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)


def _loss(model: Model, weights: Any, batch: Any) -> jax.Array:
    readout = model.readout(weights, model.forward(weights, batch).x_BTD)
    targets = jnp.roll(batch["tokens"], -1, 1)
    return losses.cross_entropy(readout, targets, jnp.ones((ROWS, T), jnp.float32), shard=model.shard).loss / (ROWS * T)


def _check_cache(model: Model, weights: Any, batch: dict, whole: np.ndarray, close: Any) -> None:
    """Reads half of the row at once and then one token at a time."""

    @jax.jit
    def read(weights: Any, part: Any, cache: Any) -> Any:
        out = model.forward(weights, part, cache=cache)
        return losses.logits(model.readout(weights, out.x_BTD), model.shard), out.cache

    cache, logits, at = model.init_cache(ROWS, T, jnp.float32), [], 0
    for n in (T // 2, *[1] * (T - T // 2)):
        part = {k: v if k.startswith("source") else v[:, at : at + n] for k, v in batch.items()
                if at == 0 or not k.startswith("source")}  # fmt: skip
        z, cache = read(weights, part, cache)
        logits.append(z)
        at += n
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, **close, err_msg="cached = at once")


def _check_mesh(
    family: Family, c: ModelConfig, sizes: config.Mesh | None, weights: Any, batch: Any, expected: Any, tolerance: float
) -> None:
    sizes = sizes or config.Mesh(fsdp=jax.device_count())
    mesh = make_mesh(sizes)
    layout = Layout.of(sizes, config.Execution(dtype="float32", scan=True))
    model = Model(family, c, family.specs(c), layout)
    shardings = layout.shardings(model.specs, mesh)
    with on_mesh(mesh):
        placed = jax.device_put(weights, shardings)
        over_rows = NamedSharding(mesh, layout.spec(("batch", None)))
        rows = jax.device_put(batch, over_rows)
        run = jax.jit(jax.value_and_grad(partial(_loss, model)), out_shardings=(None, shardings))
        _assert_equal(jax.device_get(run(placed, rows)), expected, "a mesh = one device", tolerance)


def _assert_equal(got: Any, expected: Any, law: str, tolerance: float) -> None:
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4 * tolerance, err_msg=f"{law}: losses")
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected[1]))
    for (path, a), b in zip(tree.flatten(got[1]).items(), tree.flatten(expected[1]).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * scale * tolerance, rtol=1e-2, err_msg=f"{law}: gradient of {path}")
