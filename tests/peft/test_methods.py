"""Every method × kind of model × base, on one device and on a mesh: what PEFT checks of its own."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted import CONFIGS, batch_of, disabled, logits, make, plain, shaken

from jaxlm import config, params, peft, sharding, tree

METHODS = tuple(m for m in typing.get_args(typing.get_type_hints(config.Adapter)["method"]) if m)
MERGED = ("lora", "dora", "pissa", "adalora", "vera", "ia3", "bitfit", "norms")
KINDS = list(CONFIGS)


def cases():
    """By default each method with one kind of model and base, in turn; all of them are `slow`."""
    for i, method in enumerate(METHODS):
        for j, name in enumerate(KINDS):
            for k, base in enumerate(("float32", "nf4")):
                if method == "bitfit" and name != "bert":
                    continue  # the others have no biases
                usual = method == "bitfit" or i % 3 == j
                yield pytest.param(method, name, base, marks=() if usual and (k == i % 2) else pytest.mark.slow)


# How far numbers are moved, so that each method changes logits by far more than the tolerances.
SHAKEN = {"vera": 3.0, "dora": 0.3, "ia3": 0.5}


def adapter(method: str, base: str = "float32", **more) -> config.Adapter:
    return config.Adapter(**dict(dict(method=method, base=base, rank=4, tokens=3, reduction=4.0) | more))


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
    abstract = tree.flatten(params.abstract(specs))
    assert {p: (x.shape, x.dtype) for p, x in tree.flatten(fresh).items()} == {
        p: (x.shape, x.dtype) for p, x in abstract.items()
    }
    if method not in ("prefix", "prompt", "p_tuning"):  # virtual tokens take part at once
        start = dict(ia3=1e-5, vera=1e-5, dora=1e-4, pissa=1e-4).get(method, 1e-6)
        np.testing.assert_allclose(out["fresh"], out["base"], atol=start)
    if method not in peft.OWN:  # whose base is what is trained
        np.testing.assert_array_equal(out["base"], out["also_base"])
    assert float(abs(out["moved"] - out["base"]).max()) > 1e-3, "ten times what merging may lose"
    if method in MERGED:
        np.testing.assert_allclose(out["merged"], out["moved"], atol=1e-4)
    flat = tree.flatten(grads)
    assert flat and set(flat) == {p for p in abstract if a.trainable(p)}
    for path, g in flat.items():
        assert np.isfinite(g).all(), path
        assert float(abs(g).max()) > 0 or path == "pooler_bias", path  # logits don't come from the pooler


@pytest.mark.parametrize(("method", "name", "base"), list(cases()))
def test_a_mesh_gives_the_same(method, name, base):
    mesh = config.Mesh(data=2, fsdp=2, tensor=2, axis_type="explicit")
    model, there = make(name, adapter(method, base)), make(name, adapter(method, base), mesh)
    batch, specs = batch_of(name), model.adapter.specs()
    fresh = jax.jit(lambda key: shaken(model.adapter, model.adapter.init(specs, key), SHAKEN.get(method, 0.1)))(
        jax.random.key(0)
    )

    def value(model, weights, batch):
        trainable, frozen = tree.partition(weights, model.adapter.trainable)
        loss = lambda p: jnp.square(logits(model, tree.merge(p, frozen), batch)).mean()  # noqa: E731
        return jax.value_and_grad(loss)(trainable)

    expected = jax.jit(lambda w, b: value(model, w, b))(fresh, batch)
    made = sharding.make_mesh(mesh)
    with sharding.on_mesh(made):
        placed = jax.device_put(fresh, there.shard.shardings(specs, made))
        home = sharding.NamedSharding(made, there.shard.spec(("batch", None)))
        got = jax.jit(lambda w, b: value(there, w, b))(placed, jax.device_put(batch, home))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5), jax.device_get(got[1]), expected[1])
