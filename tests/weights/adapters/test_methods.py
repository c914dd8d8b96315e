"""Every method × kind of model × base, on one device and on a mesh: what PEFT checks of its own."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.adapted_models import batch_of, logits, make, shaken

from jaxlm.core import config, spec, tree
from jaxlm.inference import decode
from jaxlm.runtime.mesh import NamedSharding, make_mesh, on_mesh
from jaxlm.weights import adapters
from jaxlm.weights.adapters import vera

METHODS = tuple(name for name in adapters.METHODS if name != "none")
MERGED = ("lora", "dora", "pissa", "adalora", "vera", "ia3", "bitfit", "norms", "orthogonal_lora")
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
SHAKEN = {"vera": 3.0, "dora": 0.3, "adalora": 0.3, "ia3": 0.5, "prefix": 0.5}


SMALL = dict(rank=4, tokens=3, reduction=4.0, previous=2)


def adapter(method: str, base: str = "float32", **more) -> config.Adapter:
    """Small settings of a method: of those that tests share, the ones it has."""
    kind = adapters.METHODS[method].Config
    small = {f.name: v for f in dataclasses.fields(kind) if (v := SMALL.get(f.name)) is not None}
    return kind(base=base, **(small | more))


@functools.cache
def base_weights(name: str) -> dict:
    """The model's own, in float32: one program for all methods."""
    specs = make(name, config.Adapter()).specs
    return jax.jit(lambda key: spec.init(specs, key))(jax.random.key(0))


@functools.cache
def base_logits(name: str, base: str):
    """`(weights, batch) → logits` of the model without an adapter: one program for all methods."""
    model = make(name, config.Adapter(base=base))
    return jax.jit(lambda w, batch: logits(model, w, batch))


def started(model, name: str) -> dict:
    """The weights at the first step, on the base that all methods share."""
    a = model.adapter
    return jax.jit(lambda own, key: a.init(a.specs(), key, existing=own))(base_weights(name), jax.random.key(0))


def moved(model, weights: dict, method: str) -> dict:
    return shaken(model.adapter, weights, SHAKEN.get(method, 0.1))


def trained(model, weights: dict, batch: dict):
    """((loss, logits), gradients) of what is trained."""
    trainable, frozen = tree.partition(weights, model.adapter.trainable)

    def loss(p):
        z = logits(model, tree.merge(p, frozen), batch)
        return jnp.square(z).mean(), z

    return jax.value_and_grad(loss, has_aux=True)(trainable)


@functools.cache
def on_one_device(method: str, name: str, base: str):
    """(model, its `trained` as one program that loops over the layers), for fresh weights and for moved ones."""
    model = make(name, adapter(method, base), scan=True)
    return model, jax.jit(functools.partial(trained, model))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_fresh_adapter_does_nothing_in_bfloat16_either(method):
    """DoRA's magnitudes are those of the weights before they are rounded, in training and as decoding reads them."""
    model = make("llama", adapter(method, targets=("all",)), dtype="bfloat16")
    weights, batch = started(model, "llama"), batch_of("llama")
    plain = make("llama", config.Adapter(), dtype="bfloat16")
    expected = jax.jit(lambda w: logits(plain, w, batch))(base_weights("llama"))
    for prepare in (lambda w: w, functools.partial(decode.prepare, model)):
        np.testing.assert_array_equal(jax.jit(lambda w, p=prepare: logits(model, p(w), batch))(weights), expected)


def test_shared_matrices_of_vera_have_the_variance_that_peft_gives_them():
    """Of He et al. 2015, 2 / inputs: for 256 inputs 0.088, and for a rank of 64 0.177."""
    c = adapters.Vera(rank=64)
    like = make("llama", c).adapter.targets["blocks/q"]
    spec_of = like.spec._replace(shape=(2, 256, 4, 64))
    shared = vera.shared(c, {"blocks/q": dataclasses.replace(like, spec=spec_of)})
    made = {name: s.init(jax.random.key(0), s.shape) for name, s in shared.items()}
    assert {name: round(float(x.std()), 3) for name, x in made.items()} == pytest.approx(
        {"a": 0.088, "b": 0.177}, abs=2e-3
    )
    assert float(jnp.abs(made["a"]).max()) == pytest.approx((6 / 256) ** 0.5, rel=1e-3)


def test_factors_of_ia3_are_not_rounded():
    model = make("llama", adapter("ia3"), dtype="bfloat16")
    weights, batch = started(model, "llama"), batch_of("llama")
    run = jax.jit(lambda w: logits(model, w, batch))
    at_first = run(weights)
    by = jax.tree.map(lambda x: 1.003 * x, weights["adapter"])
    assert float((run(weights | {"adapter": by}) != at_first).mean()) > 0.5


@pytest.mark.parametrize(("method", "name", "base"), list(cases()))
def test_one_device(method, name, base):
    """The base and the merged model run unrolled, so that both ways to run the layers are compared too."""
    model, run = on_one_device(method, name, base)
    a, batch, alone = model.adapter, batch_of(name), base_logits(name, base)
    specs = a.specs()
    fresh = started(model, name)
    other = moved(model, fresh, method)
    own, also_own = ({n: w for n, w in weights.items() if n != "adapter"} for weights in (fresh, other))
    at_rest = alone(own, batch)
    (_, at_first), _ = run(fresh, batch)
    (_, z), grads = run(other, batch)
    abstract = tree.flatten(spec.abstract(specs))
    expected = {p: (x.shape, x.dtype) for p, x in abstract.items()}
    for made in (fresh, jax.eval_shape(lambda key: a.init(specs, key), jax.random.key(0))):
        assert {p: (x.shape, x.dtype) for p, x in tree.flatten(made).items()} == expected
    if method not in ("prefix", "prompt", "p_tuning"):  # virtual tokens take part at once
        start = dict(ia3=1e-5, vera=1e-5, dora=1e-4, pissa=1e-4).get(method, 1e-6)
        np.testing.assert_allclose(at_first, at_rest, atol=start)
    if method not in ("bitfit", "norms"):  # whose base is what is trained
        np.testing.assert_array_equal(at_rest, alone(also_own, batch))
    assert float(abs(z - at_rest).max()) > 1e-3, "ten times what merging may lose"
    if method in MERGED:
        merged = jax.jit(a.merged)(other)
        np.testing.assert_allclose(base_logits(name, "float32")(merged, batch), z, atol=1e-4)
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
    model, run = on_one_device(method, name, base)
    there = make(name, adapter(method, base), mesh, scan=True)
    batch, specs = batch_of(name), model.adapter.specs()
    weights = moved(model, started(model, name), method)
    expected = run(weights, batch)
    made = make_mesh(mesh)
    with on_mesh(made):
        placed = jax.device_put(weights, there.shard.shardings(specs, made))
        home = NamedSharding(made, there.shard.spec(("batch", None)))
        got = jax.jit(functools.partial(trained, there))(placed, jax.device_put(batch, home))
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-5), jax.device_get(got[1]), expected[1])


@pytest.mark.parametrize("method", [
    pytest.param(m, marks=() if m == "prefix" else pytest.mark.slow)
    for m in ("prefix", "prompt", "p_tuning", "lora", "dora", "ia3", "houlsby", "parallel")
])  # fmt: skip
def test_packed_and_read_on_from_a_cache_as_alone_at_once(method):
    """Texts of a row see the virtual tokens and not each other; a cache keeps room for them."""
    model = make("llama", adapter(method, "nf4" if method in ("lora", "ia3") else "float32"))
    weights = moved(model, started(model, "llama"), method)
    batch = batch_of("llama", 2, 12)
    at_once = jax.jit(lambda w, b: logits(model, w, b))
    padded = {name: jnp.pad(x, ((0, 0), (0, 12))) for name, x in batch.items()}
    alone = at_once(weights, padded)[:, :12]

    one = {name: x.reshape(1, 24) for name, x in batch.items()} | dict(segments=np.repeat([[1, 2]], 12, 1))
    packed = at_once(weights, {name: np.repeat(x, 2, 0).astype(np.int32) for name, x in one.items()})  # of one shape
    np.testing.assert_allclose(packed[0].reshape(alone.shape), alone, atol=2e-5)

    def with_cache(w, b):
        w = decode.prepare(model, w)
        first = {name: x[:, :8] for name, x in b.items()}
        last, cache = decode.prefill(model, w, first, 12)
        rest, _ = decode.extend(model, w, cache, b["tokens"][:, 8:9], b["positions"][:, 8:9])
        return jnp.concatenate([last[:, None], rest], 1)

    np.testing.assert_allclose(jax.jit(with_cache)(weights, batch), alone[:, 7:9], atol=2e-5)
