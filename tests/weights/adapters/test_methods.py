"""Every method × kind of model × base, on one device and on a mesh: what PEFT checks of its own."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.adapted_models import batch_of, disabled, logits, make, plain, shaken

from jaxlm.core import config, spec, tree
from jaxlm.inference import decode
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh
from jaxlm.weights import adapters

METHODS = tuple(name for name in adapters.METHODS if name != "none")
MERGED = ("lora", "dora", "pissa", "adalora", "vera", "ia3", "bitfit", "norms")
KINDS = ("llama", "bert", "t5")
WITH_BIASES = ("gpt2", "bert", "bart")


FEW_BITS = {"lora": "nf4", "ia3": "int8"}  # bases other than float32 by default


def cases(usual: Sequence[str] = METHODS, kinds: dict[str, str] = {"bitfit": "bert", "prompt": "t5"}):  # noqa: B006
    """By default each of the `usual` methods with one kind of model and base, in turn; all of them are `slow`."""
    for i, method in enumerate(METHODS):
        own, bits = kinds.get(method, KINDS[i % 2]), FEW_BITS.get(method, "float32")
        for name in WITH_BIASES if method == "bitfit" else KINDS:
            for base in dict.fromkeys(("float32", "nf4", bits)):
                default = method in usual and name == own and base == bits
                yield pytest.param(method, name, base, marks=() if default else pytest.mark.slow)


# How far numbers are moved, so that each method changes logits by far more than the tolerances.
SHAKEN = {"vera": 3.0, "dora": 0.3, "ia3": 0.5, "prefix": 0.5}


SMALL = dict(rank=4, tokens=3, reduction=4.0)


def adapter(method: str, base: str = "float32", **more) -> config.Adapter:
    """Small settings of a method: of those that tests share, the ones it has."""
    kind = adapters.METHODS[method].Config
    small = {f.name: v for f in dataclasses.fields(kind) if (v := SMALL.get(f.name)) is not None}
    return kind(base=base, **(small | more))


@pytest.mark.parametrize(("method", "name", "base"), list(cases()))
def test_one_device(method, name, base):
    model = make(name, adapter(method, base))
    a, batch = model.adapter, batch_of(name)
    specs = a.specs()

    def figures(key):
        fresh = a.init(specs, key)
        moved = shaken(a, fresh, SHAKEN.get(method, 0.1))
        own = {n: w for n, w in fresh.items() if n != "adapter"}
        out = dict(
            base=logits(disabled(model), own, batch),
            also_base=logits(disabled(model), {n: w for n, w in moved.items() if n != "adapter"}, batch),
            fresh=logits(model, fresh, batch),
            moved=logits(model, moved, batch),
        )
        if method in MERGED:
            out["merged"] = logits(plain(model), a.merged(moved), batch)
        trainable, frozen = tree.partition(moved, a.trainable)
        loss = lambda p: jnp.square(logits(model, tree.merge(p, frozen), batch)).mean()  # noqa: E731
        return out, fresh, jax.grad(loss)(trainable)

    out, fresh, grads = jax.jit(figures)(jax.random.key(0))
    abstract = tree.flatten(spec.abstract(specs))
    assert {p: (x.shape, x.dtype) for p, x in tree.flatten(fresh).items()} == {
        p: (x.shape, x.dtype) for p, x in abstract.items()
    }
    if method not in ("prefix", "prompt", "p_tuning"):  # virtual tokens take part at once
        start = dict(ia3=1e-5, vera=1e-5, dora=1e-4, pissa=1e-4).get(method, 1e-6)
        np.testing.assert_allclose(out["fresh"], out["base"], atol=start)
    if method not in ("bitfit", "norms"):  # whose base is what is trained
        np.testing.assert_array_equal(out["base"], out["also_base"])
    assert float(abs(out["moved"] - out["base"]).max()) > 1e-3, "ten times what merging may lose"
    if method in MERGED:
        np.testing.assert_allclose(out["merged"], out["moved"], atol=1e-4)
    flat = tree.flatten(grads)
    assert flat and set(flat) == {p for p in abstract if a.trainable(p)}
    for path, g in flat.items():
        assert np.isfinite(g).all(), path
        unused = path in ("pooler_bias", "type_bias")  # logits don't come from the pooler
        assert float(abs(g).max()) > 0 or unused, path


ON_A_MESH = dict(lora="llama", prefix="bert", prompt="llama")  # by default: of weights, of keys, of tokens


@pytest.mark.parametrize(("method", "name", "base"), list(cases(tuple(ON_A_MESH), ON_A_MESH)))
def test_a_mesh_gives_the_same(method, name, base):
    mesh = config.Mesh(data=2, fsdp=2, tensor=2, axis_type="explicit")
    model, there = make(name, adapter(method, base)), make(name, adapter(method, base), mesh)
    batch, specs = batch_of(name), model.adapter.specs()
    fresh = moved(model, method)

    def value(model, weights, batch):
        trainable, frozen = tree.partition(weights, model.adapter.trainable)
        loss = lambda p: jnp.square(logits(model, tree.merge(p, frozen), batch)).mean()  # noqa: E731
        return jax.value_and_grad(loss)(trainable)

    expected = jax.jit(lambda w, b: value(model, w, b))(fresh, batch)
    made = make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put(fresh, there.shard.shardings(specs, made))
        home = NamedSharding(made, there.shard.spec(("batch", None)))
        got = jax.jit(lambda w, b: value(there, w, b))(placed, jax.device_put(batch, home))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5), jax.device_get(got[1]), expected[1])


def moved(model, method):
    a = model.adapter
    return jax.jit(lambda key: shaken(a, a.init(a.specs(), key), SHAKEN.get(method, 0.1)))(jax.random.key(0))


@pytest.mark.parametrize("method", [
    pytest.param(m, marks=() if m == "prefix" else pytest.mark.slow)
    for m in ("prefix", "prompt", "p_tuning", "lora", "dora", "ia3", "houlsby", "parallel")
])  # fmt: skip
def test_packed_and_read_on_from_a_cache_as_alone_at_once(method):
    """Texts of a row see the virtual tokens and not each other; a cache keeps room for them."""
    model = make("llama", adapter(method, "nf4" if method in ("lora", "ia3") else "float32"))
    weights, batch = moved(model, method), batch_of("llama", 2, 12)
    at_once = jax.jit(lambda w, b: logits(model, w, b))
    alone = at_once(weights, batch)

    one = {name: x.reshape(1, 24) for name, x in batch.items()}
    packed = at_once(weights, one | dict(segments=jnp.repeat(jnp.array([[1, 2]]), 12, 1)))
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=2e-5)

    def with_cache(w, b):
        w = decode.prepare(model, w)
        first = {name: x[:, :8] for name, x in b.items()}
        last, cache = decode.prefill(model, w, first, 12)
        rest, _ = decode.extend(model, w, cache, b["tokens"][:, 8:9], b["positions"][:, 8:9])
        return jnp.concatenate([last[:, None], rest], 1)

    np.testing.assert_allclose(jax.jit(with_cache)(weights, batch), alone[:, 7:9], atol=2e-5)
