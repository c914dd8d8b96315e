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
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly.run_objective import BoundObjective, row_shape
from jaxlm.core import config, spec, tree
from jaxlm.core.batch import Batch
from jaxlm.data import packing
from jaxlm.data.tokenizer import Bytes
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.cache import with_own_ends
from jaxlm.nn.family import Family, ModelConfig, RunsItself
from jaxlm.nn.layout import Layout
from jaxlm.objectives.objective import Objective
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh
from jaxlm.weights.adapters.adapted import Adapted
from jaxlm.weights.adapters.method import Method

LENGTH, T, ROWS = 15, 12, 8  # of rows with padding, of texts in them, and of the batches whose gradients are compared
ATOL, RTOL = 2e-5, 1e-4


def check_family(
    family: Family, c: ModelConfig, *, mesh: config.Mesh | None = None, tolerance: float = 1.0
) -> list[str]:
    """Checks a family with a small configuration of 20 positions or more: what `specs` says of its weights, causality,
    packed = alone, cached = at once, scanned = unrolled, and a mesh = one device where there are several: `mesh`, by
    default `fsdp` over all. `tolerance` multiplies what results may differ by."""
    laws = FamilyLaws(family, c, tolerance)
    laws.check_settings()
    names = ["settings are JSON", "specs"]
    if family.generates:
        laws.check_causality()
        names.append("causality")
    laws.check_packed()
    names += ["logits are finite", "packed = alone"]
    if family.generates:
        laws.check_cache()
        laws.check_cache_of_rows()
        names += ["cached = at once", "rows with ends of their own = at once"]
    if not isinstance(family, RunsItself):
        laws.check_scanned()
        names.append("scanned and rematerialized = unrolled")
    if jax.device_count() > 1:
        laws.check_mesh(mesh or config.Mesh(fsdp=jax.device_count()))
        names.append("a mesh = one device")
    return names


class FamilyLaws:
    """A FamilyLaws checks the laws of one model one by one; those that can share a compiled program."""

    def __init__(self, family: Family, c: ModelConfig, tolerance: float = 1.0) -> None:
        self.family, self.c, self.tolerance = family, c, tolerance
        own = isinstance(family, RunsItself)
        self._looped: dict[str, Any] = {} if own else dict(scan=True)
        self._recomputed = self._looped if own else dict(scan=True, remat="full")
        self.specs = family.specs(c)
        self.weights = _weights(self.specs)

    @cached_property
    def _model(self) -> Model:
        """The model whose layers are looped over; with a cache they are unrolled."""
        return _model(self.family, self.c, **self._looped)

    @cached_property
    def _run(self) -> Any:
        """One program for the laws about logits, of two rows of `LENGTH`."""
        return jax.jit(partial(_logits, self._model))

    def _same(self, got: Any, expected: Any, law: str) -> None:
        close: Any = dict(atol=ATOL * self.tolerance, rtol=RTOL * self.tolerance)
        np.testing.assert_allclose(got, expected, err_msg=law, **close)

    def check_settings(self) -> None:
        """Checks that settings are JSON's own values, and that every spec names each of its dimensions."""
        values = dataclasses.asdict(self.c)  # type: ignore[call-overload]
        assert json.loads(json.dumps(values)) == _as_json(values), "settings: not all values are JSON's own"
        for path, s in tree.flatten(self.specs, spec.is_spec).items():
            assert len(s.shape) == len(s.axes), f"specs: {path} has {len(s.shape)} dimensions and {len(s.axes)} axes"

    def check_causality(self) -> None:
        """Checks that a position sees no later one, and that tokens matter."""
        batch = _padded(self._documents((T,), rows=2)[0], LENGTH)
        changed = batch["tokens"].copy()
        changed[:, T // 2] = (changed[:, T // 2] + 1) % self.c.vocab
        whole, other = (np.asarray(self._run(self.weights, batch | {"tokens": x})) for x in (batch["tokens"], changed))
        self._same(other[:, : T // 2], whole[:, : T // 2], "a position sees the next")
        assert np.abs(other[:, T // 2 : T] - whole[:, T // 2 : T]).max() > 1e-4, "a token changes nothing"

    def check_packed(self) -> None:
        """Checks that two texts in rows of their own say the same as in one row, always with padding, of which there
        are unlike numbers."""
        parts = self._documents((T // 2, T // 2))
        together = _padded(_packed(parts), LENGTH)
        packed = self._run(self.weights, {k: np.repeat(v, 2, 0) for k, v in together.items()})[0, :T]
        rows = [_padded(p, LENGTH) for p in parts]
        alone = self._run(self.weights, {k: np.concatenate([p[k] for p in rows]) for k in rows[0]})[:, : T // 2]
        assert np.isfinite(packed).all(), "forward: logits are not finite"
        self._same(packed, alone.reshape(packed.shape), "packed = alone")

    def check_cache(self) -> None:
        """Checks prompts of 5 and 3 tokens padded on the left, then one token at a time, past every window; where there
        are windows, the last three at once, for which the cache has slack."""
        model, prompt = self._model, 5
        batch = self._documents((T,), rows=2)[0]
        start = np.array([[0], [2]])  # of each row
        batch["segments"] = (np.arange(T)[None] >= start).astype(np.int32)
        batch["positions"] = np.maximum(np.arange(T, dtype=np.int32)[None] - start, 0).astype(np.int32)
        if "source" in batch:  # of unlike lengths, and said with the first call alone
            batch["source_segments"] = batch["source_segments"] * (np.arange(T + 2)[None] < [[T + 2], [5]])
        expected = np.asarray(self._run(self.weights, _padded(batch, LENGTH)))[:, :T]

        slots = lambda slack: jax.eval_shape(lambda: model.init_cache(2, T, jnp.float32, slack))  # noqa: E731
        last = 3 if slots(0).layers != slots(1).layers else 1
        cache, logits, at = model.init_cache(2, T, jnp.float32, last - 1), [], 0
        for n in (prompt, *[1] * (T - prompt - last), last):
            part = {k: v[:, at : at + n] for k, v in batch.items() if not k.startswith("source")}
            part |= {k: v for k, v in batch.items() if k.startswith("source") and at == 0}
            z, cache = self._read_on(self.weights, part, cache)
            logits.append(z)
            at += n
        real = batch["segments"] > 0
        self._same(np.concatenate(logits, 1)[real], expected[real], "cached = at once")
        assert int(cache.end) == T, "cached = at once: the cache's `end` is not the number of tokens"

    def check_cache_of_rows(self) -> None:
        """Checks rows that are read on from ends of their own: prompts of 5 and 3 tokens padded on the right, then
        calls that bring 2 tokens of one row and 1 of the other, and 1 of the other alone."""
        model = self._model
        batch = self._documents((T,), rows=2)[0]
        if "source" in batch:
            batch["source_segments"] = batch["source_segments"] * (np.arange(T + 2)[None] < [[T + 2], [5]])
        expected = np.asarray(self._run(self.weights, _padded(batch, LENGTH)))[:, :T]

        ends, cache = np.zeros(2, int), with_own_ends(model.init_cache(2, LENGTH, jnp.float32, LENGTH))
        for counts in ([5, 3], [2, 1], [0, 1], [1, 2]):
            n = max(counts)
            at = ends[:, None] + np.arange(n)[None]
            real = np.arange(n)[None] < np.array(counts)[:, None]
            part = {k: np.take_along_axis(batch[k], np.minimum(at, T - 1), 1) for k in ("tokens", "positions")}
            part["segments"] = real.astype(np.int32)
            part |= {k: v for k, v in batch.items() if k.startswith("source") and not ends.any()}
            z, cache = self._read_on(self.weights, part, cache)
            wanted = np.take_along_axis(expected, np.minimum(at, T - 1)[..., None], 1)
            self._same(np.asarray(z)[real], wanted[real], "rows with ends of their own = at once")
            ends += counts
            assert np.array_equal(cache.end, ends), "rows with ends of their own: `end` is not each row's tokens"

    @cached_property
    def _read_on(self) -> Any:
        """The logits of a part of the rows that a cache has the beginning of, and the cache."""
        model = self._model

        @jax.jit
        def read(weights: Any, part: Any, cache: Any) -> Any:
            out = model.forward(weights, part, cache=cache)
            return losses.logits(model.readout(weights, out.x_BTD), model.shard), out.cache

        return read

    @cached_property
    def _gradients(self) -> Any:
        """The loss and gradients on one device with unrolled layers."""
        model = _model(self.family, self.c, **({} if not self._looped else dict(scan=False)))
        return jax.jit(jax.value_and_grad(partial(_loss, model)))(self.weights, self._rows)

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        return self._documents((8,), rows=ROWS)[0]

    def check_scanned(self) -> None:
        """Checks that layers in a loop, recomputed backwards, have the loss and gradients of unrolled ones."""
        model = _model(self.family, self.c, **self._recomputed)
        got = jax.jit(jax.value_and_grad(partial(_loss, model)))(self.weights, self._rows)
        self._same_gradients(got, "scanned and rematerialized = unrolled")

    def check_mesh(self, sizes: config.Mesh) -> None:
        """Checks that a mesh has the loss and gradients of one device, layers in a loop and recomputed."""
        mesh = make_mesh(sizes)
        layout = Layout.of(sizes, config.Execution(dtype="float32", **self._recomputed))
        model = Model(self.family, self.c, self.specs, layout)
        shardings = layout.shardings(self.specs, mesh)
        with on_mesh(mesh):
            placed = jax.device_put(self.weights, shardings)
            rows = jax.device_put(self._rows, NamedSharding(mesh, layout.spec(("batch", None))))
            run = jax.jit(jax.value_and_grad(partial(_loss, model)), out_shardings=(None, shardings))
            self._same_gradients(jax.device_get(run(placed, rows)), "a mesh = one device")

    def _same_gradients(self, got: Any, law: str) -> None:
        expected, rtol = self._gradients, 1e-5 * self.tolerance
        np.testing.assert_allclose(got[0], expected[0], rtol=rtol, err_msg=f"{law}: losses")
        scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(expected[1]))
        assert scale > 1e-3, "no weight has a gradient"
        close: Any = dict(atol=2 * rtol * scale, rtol=100 * rtol)
        for (path, a), b in zip(tree.flatten(got[1]).items(), tree.flatten(expected[1]).values(), strict=True):
            np.testing.assert_allclose(a, b, err_msg=f"{law}: gradient of {path}", **close)

    def _documents(self, lengths: tuple[int, ...], rows: int = 1) -> list[dict[str, np.ndarray]]:
        """Makes batches of one document a row; an encoder-decoder's has a source of another length."""
        rng, out = np.random.default_rng(1), []
        for n in lengths:
            count = lambda n: np.broadcast_to(np.arange(n, dtype=np.int32), (rows, n))  # noqa: E731
            draw = lambda n: rng.integers(4, self.c.vocab, (rows, n)).astype(np.int32)  # noqa: E731
            one = dict(tokens=draw(n), positions=count(n), segments=np.ones((rows, n), np.int32))
            if self.family.kind == "encoder_decoder":
                m = n + 2
                one |= dict(source=draw(m), source_positions=count(m), source_segments=np.ones((rows, m), np.int32))
            out.append(one)
        return out


def check_objective(
    objective: Objective, settings: Any, records: Sequence[Any], family: Family, c: ModelConfig, *,
    tokenizer: Any = None, seq_len: int = 32,
) -> list[str]:  # fmt: skip
    """Checks an objective on a small model, with records as its `example` takes them (four or more, and the model's
    vocabulary as large as the tokenizer's; by default bytes): rows of one shape with documented keys, the same from the
    same seed, losses that are sums over rows, rows of padding that add nothing, texts that may share rows where it says
    so (`padding`), weights of its own that learn and whose shapes follow the model's width, and prompts that are token
    ids."""
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
    assert {dtype for _, dtype in shapes[0].values()} <= {"int32", "float32", "bool"}, f"example: dtypes of {shapes[0]}"
    sent = pickle.loads(pickle.dumps(task))  # as to a worker of the loader
    for i, row in enumerate(rows):
        again = dict(sent.example(records[i % len(records)], np.random.default_rng(i)))
        for name, x in again.items():
            np.testing.assert_array_equal(x, row[name], err_msg=f"example: {name} differs with the same seed")
    heads = task.specs(c.width)
    for name, s in heads.items():
        assert len(s.shape) == len(s.axes), f"specs: {name} has {len(s.shape)} dimensions and {len(s.axes)} axes"
        wider = tuple(n * (2 if axis == "embed" else 1) for n, axis in zip(s.shape, s.axes, strict=True))
        assert task.specs(2 * c.width)[name].shape == wider, f"specs: {name} does not follow the model's width"
    prompts, sources = task.prompts(["a dog", "it"])
    assert len(prompts) == 2 and all(isinstance(i, int) for ids in prompts for i in ids), "prompts: not two of ids"
    assert (sources is not None) == (family.kind == "encoder_decoder"), "prompts: sources are for encoder-decoders"
    specs = family.specs(c) | heads
    model = Model(family, c, specs, Layout(execution=config.Execution(dtype="float32", scan=True)))

    @jax.jit
    def step(weights: Any, batch: Any) -> Any:
        def value(own: Any) -> Any:
            sums = task.loss(model, weights | own, batch, None)
            return sum(part["loss"] for part in sums.values()), (sums, task.totals(batch))

        (_, aux), gradients = jax.value_and_grad(value, has_aux=True)({name: weights[name] for name in heads})
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
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4, err_msg="sums over rows, padding adds nothing")
    jax.tree.map(same, jax.tree.map(float, (sums, totals)), added)
    laws = [
        "rows of one shape", "the same from the same seed, in a worker too", "losses are sums", "own weights learn",
        "own weights follow the width", "prompts are ids",
    ]  # fmt: skip
    if objective.padding == "pack":
        shared = packing.pack_batch({name: np.stack([row[name] for row in rows])[None] for name in rows[0]})
        found, _ = step(weights, {name: jnp.asarray(x[0]) for name, x in shared.items()})
        jax.tree.map(partial(same, err_msg="texts that share rows give the same sums"), found, (sums, totals))
        laws.append("texts share rows")
    return laws


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


def _packed(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns all documents in one row."""
    number = lambda key, i: i + 1 if key.endswith("segments") else 1  # noqa: E731
    return {key: np.concatenate([p[key] * number(key, i) for i, p in enumerate(parts)], 1) for key in parts[0]}


def _padded(batch: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Returns a batch with padding behind each row, and behind its source."""
    sizes = {True: length + 4, False: length}
    return {k: np.pad(v, ((0, 0), (0, sizes[k.startswith("source")] - v.shape[1]))) for k, v in batch.items()}


def _stacked(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _model(family: Family, c: ModelConfig, **execution: Any) -> Model:
    return Model(family, c, family.specs(c), Layout(execution=config.Execution(dtype="float32", **execution)))


def _logits(model: Model, weights: Any, batch: Any) -> jax.Array:
    return losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)


def _loss(model: Model, weights: Any, batch: Any) -> jax.Array:
    """Returns the mean loss of the next tokens, with what experts add to it."""
    out = model.forward(weights, batch)
    targets = jnp.roll(batch["tokens"], -1, 1)
    readout, ones = model.readout(weights, out.x_BTD), jnp.ones(targets.shape, jnp.float32)
    aux = jnp.zeros(()) if out.aux_B is None else out.aux_B.sum() * targets.shape[1]
    return (losses.cross_entropy(readout, targets, ones, shard=model.shard).loss + aux) / targets.size
