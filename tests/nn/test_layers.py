"""The parts of a Transformer against their formulas, in float32 inside whatever the outside."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from support.sized_models import SIZES, batch_of, tiny

from jaxlm.core import config
from jaxlm.core.spec import Spec, is_spec
from jaxlm.models import gpt2, llama
from jaxlm.models.model import Model
from jaxlm.nn import attention_layers, block_stack, layers, layout
from jaxlm.nn import remat as rematerialization
from jaxlm.nn.mask import Mask
from jaxlm.nn.remat import but_cheap, remat_policy
from jaxlm.planning import hlo
from jaxlm.runtime.mesh import make_mesh, on_mesh

RNG = np.random.default_rng(0)
X = (3 * RNG.standard_normal((2, 5, 8)) + 1).astype(np.float32)
SCALE, BIAS = (RNG.standard_normal(8).astype(np.float32) for _ in range(2))


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def shard(**execution) -> layout.Layout:
    return layout.Layout(execution=config.Execution(**{"dtype": "float32"} | execution))


def test_norms():
    mean, var = X.mean(-1, keepdims=True), X.var(-1, keepdims=True)
    expected = (X - mean) / np.sqrt(var + 1e-5) * SCALE + BIAS
    np.testing.assert_allclose(layers.layer_norm(X, SCALE, BIAS, 1e-5), expected, atol=1e-5)
    np.testing.assert_allclose(layers.layer_norm(X, SCALE, None, 1e-5), expected - BIAS, atol=1e-5)
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5) * SCALE
    np.testing.assert_allclose(layers.rms_norm(X, SCALE, 1e-5), expected, atol=1e-5)


def test_norms_of_bfloat16_are_computed_in_float32():
    """Values near 256 are 2 apart in bfloat16: statistics formed there would be far off."""
    x = jnp.asarray(256 + 8 * RNG.standard_normal((4, 64)), jnp.bfloat16)
    one, zero = jnp.ones(64), jnp.zeros(64)
    y = layers.layer_norm(x, one, zero, 1e-5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(jnp.float32), layers.layer_norm(x.astype(jnp.float32), one, zero, 1e-5), atol=0.02
    )


def test_embed_adds_up_the_gradients_of_repeated_tokens_in_float32():
    table = jnp.zeros((4, 2))
    ids = jnp.zeros((1, 1000), jnp.int32)
    g = jax.grad(lambda w: layers.embed(w, ids, shard(dtype="bfloat16")).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(g[0], 1000.0)  # bfloat16 would stop at 256
    np.testing.assert_array_equal(g[1:], 0.0)


@pytest.mark.parametrize("tokens", [2048, 131072])
@pytest.mark.parametrize("layer", [layers.add_bias, layers.times], ids=["added", "multiplied"])
def test_gradients_of_vectors_add_up_in_float32(layer, tokens):
    """In bfloat16 a sum of ones stops growing long before."""
    x = jnp.ones((tokens, 1), jnp.bfloat16)
    slope = jax.jit(jax.grad(lambda w: layer(x, w).astype(jnp.float32).sum()))(jnp.ones(1))
    np.testing.assert_array_equal(slope, tokens)


def test_a_bias_is_added_as_in_the_dtype_of_what_it_is_added_to():
    x, b = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((64, 4, 8), (4, 8)))
    for dtype in (jnp.bfloat16, jnp.float32):
        plain = x.astype(dtype) + b.astype(dtype)[None]
        np.testing.assert_array_equal(jax.jit(layers.add_bias)(x.astype(dtype), b), plain)


def test_a_factor_is_not_rounded_to_the_dtype_of_what_it_multiplies():
    x = jnp.asarray(RNG.standard_normal(4096), jnp.bfloat16)
    exact = x.astype(jnp.float32) * 1.003
    for by in (1.003, jnp.full(4096, 1.003)):
        np.testing.assert_array_equal(layers.times(x, by), exact.astype(jnp.bfloat16))
    assert float((layers.times(x, 1.003) != x).mean()) > 0.3  # bfloat16's 1.003 is 1


def test_blocks_get_vectors_in_float32_and_matrices_in_the_compute_dtype():
    head = ("layers", "heads", None)
    specs = dict(
        matrix=Spec((1, 4, 8), ("layers", "embed", "ffn"), None), sinks=Spec((1, 4), ("layers", "heads"), None),
        norm=Spec((1, 4, 8), head, None, role="norm"), scale=Spec((1, 4, 8), head, None, role="scale"),
        bias=Spec((1, 4, 8), head, None, role="bias"),
    )  # fmt: skip
    found = shard(dtype="bfloat16").gather({name: jnp.full(s.shape[1:], 1.003) for name, s in specs.items()}, specs)
    assert {name for name, w in found.items() if w.dtype == jnp.bfloat16} == {"matrix"}
    assert all((w == np.float32(1.003)).all() for name, w in found.items() if name != "matrix")


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.5])
def test_dropout_in_bfloat16_keeps_the_mean_and_the_rate(rate):
    """1 / 0.9 is 1.109 there, with which the mean of ones is 0.9984."""
    x, key = jnp.ones(1 << 22, jnp.bfloat16), jax.random.key(1)
    y = np.asarray(jax.jit(lambda x: layers.dropout(x, rate, key).astype(jnp.float32))(x), np.float64)
    noise = 4 * np.sqrt(rate / (1 - rate) / x.size)
    assert y.mean() == pytest.approx(1.0, abs=noise)
    assert (y == 0).mean() == pytest.approx(rate, abs=noise)
    np.testing.assert_allclose(y[y > 0], 1 / (1 - rate), rtol=0.01)


def test_dropout():
    x, key = jnp.ones((200, 200)), jax.random.key(0)
    y = layers.dropout(x, 0.25, key)
    assert float((y == 0).mean()) == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(y[y != 0], 1 / 0.75, rtol=1e-6)
    assert layers.dropout(x, 0.25, None) is x and layers.dropout(x, 0.0, key) is x
    assert layers.subkeys(None, 3) == [None] * 3
    assert layers.dropout(x.astype(jnp.bfloat16), 0.25, key).dtype == jnp.bfloat16


@pytest.mark.parametrize("kinds", ["aaaaa", "ababa", "aabbb", "abcde"])
@pytest.mark.parametrize("scan", [True, False])
def test_blocks_run_in_order_each_with_its_own_key_and_kind(scan, kinds):
    weights, specs = {"w": jnp.arange(1.0, 6.0)[:, None]}, {"w": Spec((5, 1), ("layers", None), None)}
    seen = []

    def block(p, x, rows, key, kind, kept):
        if not scan:
            seen.append(jax.random.key_data(key).tolist())
        return {k: 10 * v + p["w"] * float(k == kind) for k, v in x.items()}, None

    start = {k: jnp.zeros(1) for k in "abcde"}
    arguments = dict(shard=shard(scan=scan), key=jax.random.key(0), kinds=list(kinds))
    y, _ = block_stack.run_blocks(block, weights, specs, start, **arguments)
    for kind in "abcde":
        digits = [str(i + 1) if k == kind else "0" for i, k in enumerate(kinds)]
        assert y[kind].tolist() == [float("".join(digits))]
    assert scan or len({tuple(k) for k in seen}) == 5
    split = tuple({"w": w} for w in weights["w"])
    assert (
        not scan or block_stack.run_blocks(block, split, specs, start, **arguments)[0]["a"].tolist() == y["a"].tolist()
    )


@pytest.mark.parametrize(
    ("kinds", "loops"),
    [
        ("aaaa", [(0, 4, 1)]),
        ("ababab", [(0, 6, 2)]),
        ("aabaabaa", [(0, 6, 3), (6, 8, 2)]),
        ("aaab", [(0, 3, 1), (3, 4, 1)]),
        ("a", [(0, 1, 1)]),
    ],
)
def test_a_pattern_of_layers_becomes_as_few_loops_as_it_can(kinds, loops):
    assert block_stack.stretches(kinds) == loops


@pytest.mark.parametrize(("choice", "expected"), [(True, True), (False, False), (None, False)])
def test_layers_are_scanned_when_asked_and_by_default_where_loops_are_quick(choice, expected):
    assert block_stack.scanned(shard(scan=choice)) is expected


def test_full_rematerialization_keeps_no_activation_of_a_block():
    def kept(remat: str) -> int:
        def f(w, x):
            block = lambda p, x, *_: (jnp.tanh(x @ p["w"]), None)  # noqa: E731
            specs = {"w": Spec((4, 8, 8), ("layers", None, None), None)}
            return block_stack.run_blocks(block, w, specs, x, shard=shard(scan=True, remat=remat), key=None)[0].sum()

        _, back = jax.vjp(f, {"w": jnp.ones((4, 8, 8))}, jnp.ones((16, 8)))
        return sum(x.size for x in jax.tree.leaves(back) if hasattr(x, "size"))

    assert kept("full") < kept("dots") <= kept("none")


@pytest.mark.parametrize("matmul", ["dtype", "fp8", "mxfp8", "int8"])
@pytest.mark.parametrize("family", [llama, gpt2])
def test_a_loop_over_layers_keeps_products_and_no_weight_once_in_the_compute_dtype(family, matmul):
    """At most 34 bytes a token and channel, with attention's scores left out (Korthikanti et al. 2022)."""
    T, ffn = 256, 672 if family is llama else 768
    more = dict(kv_heads=3, head_width=64) if family is llama else dict(positions=T)
    c = family.Config(vocab=512, layers=3, width=192, heads=3, ffn=ffn, **more)
    execution = config.Execution(scan=True, attention="xla", matmul=matmul)
    model = Model(family, c, family.specs(c), layout.Layout(execution=execution))
    batch = {name: jax.ShapeDtypeStruct((2, T), "int32") for name in ("tokens", "positions", "segments")}
    weights = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, "float32"), model.specs, is_leaf=is_spec)

    def back(w, b):
        return jax.vjp(lambda w: model.forward(w, b).x_BTD.astype("float32").sum(), w)[1]

    declared = {s.shape for s in jax.tree.leaves(model.specs, is_leaf=is_spec)}
    found = [v.aval for v in jax.make_jaxpr(back)(weights, batch).jaxpr.outvars]
    stacks = [x for x in found if x.shape[:1] == (3,) and x.shape not in declared and x.shape[-1] not in (T, T // 2)]
    large = [x for x in stacks if math.prod(x.shape[1:]) >= 2 * T * 64]
    assert large and all(x.dtype == "bfloat16" for x in large), large
    assert sum(x.size * x.dtype.itemsize for x in stacks) <= 34 * 3 * 2 * T * 192
    assert not any(x.dtype == "bfloat16" and x.shape in declared for x in found)


@pytest.mark.parametrize("name", SIZES)
def test_a_loop_over_layers_of_each_family_computes_again_what_is_no_product_nor_sort(name, monkeypatch):
    kept = set()

    def policy(primitive, *inputs, **params):
        keep = but_cheap(primitive, *inputs, **params)
        kept.update([primitive.name] if keep else ())
        return keep

    monkeypatch.setattr(rematerialization, "but_cheap", policy)
    made, execution = tiny(name), config.Execution(attention="xla", scan=True)
    model = dataclasses.replace(made.model, shard=layout.Layout(execution=execution))
    loss = lambda w: model.forward(w, batch_of(model)).x_BTD.astype("float32").sum()  # noqa: E731
    jax.make_jaxpr(jax.grad(loss))(made.weights)
    routing = {"top_k", "sort", "gather", "scatter", "cumsum", "rem", "call_hi_primitive", "custom_vjp_call"}
    assert "dot_general" in kept and kept <= {"dot_general"} | (routing if name == "deepseek" else set())


def test_dropout_in_a_loop_over_layers_keeps_its_factors_and_draws_once():
    c = gpt2.Config(vocab=64, layers=3, width=64, heads=1, positions=128, dropout=0.1)
    model = Model(gpt2, c, gpt2.specs(c), layout.Layout(execution=config.Execution(scan=True, attention="xla")))
    batch = {name: jax.ShapeDtypeStruct((2, 128), "int32") for name in ("tokens", "positions", "segments")}
    weights = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, "float32"), model.specs, is_leaf=is_spec)
    loss = lambda w, b, k: model.forward(w, b, key=k).x_BTD.astype("float32").sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss))(weights, batch, jax.random.key(0)))
    drawn = program.count("f32[2,128,64] = jit[name=_uniform")
    assert drawn == 3  # after the embeddings, and two of a layer, in the forward loop alone
    assert "bool[3,2,128,64]" not in program and "u32[3,2,128,64]" not in program and "bf16[3,2,128,64]" in program


def activations(remat: str, offload: tuple[str, ...] = ()) -> list:
    """Those that a block of attention and an mlp keeps, as avals with their memory space."""
    D, F = 8, 64
    axes = dict(q=(D, 2, 4), k=(D, 2, 4), v=(D, 2, 4), o=(2, 4, D), up=(D, F), down=(F, D))
    specs = {n: Spec((2, *s), ("layers", *[None] * len(s)), None) for n, s in axes.items()}
    how = shard(scan=True, remat=remat, offload=offload)

    def block(p, x, *_):
        x += attention_layers.self_attention(p, x, Mask(True), shard=how)[0]
        return x + layers.mlp(p, x, "silu", how), None

    def f(w, x):
        return block_stack.run_blocks(block, w, specs, x, shard=how, key=None)[0].sum()

    weights = {n: jnp.ones(s.shape) for n, s in specs.items()}
    jaxpr = jax.make_jaxpr(lambda w, x: jax.vjp(f, w, x)[1])(weights, jnp.ones((3, 16, D)))
    return [v.aval for v in jaxpr.jaxpr.outvars if v.aval.shape[:3] == (2, 3, 16)]


@pytest.mark.parametrize(
    ("remat", "shapes"),
    [
        ("full", [(8,)]),
        ("qkv", [(2, 4)] * 3 + [(8,)]),
        ("attention", [(2, 4)] * 4 + [(8,)] * 2),
    ],
)
def test_remat_keeps_what_its_name_says(remat, shapes):
    """Beside each block's input, and never anything of the mlp's width."""
    assert sorted(a.shape[3:] for a in activations(remat)) == sorted(shapes)


def test_named_activations_wait_in_the_hosts_memory():
    kept = activations("qkv", ("input", "q"))
    host = sorted(a.shape[3:] for a in kept if a.memory_space == jax.memory.Space.Host)
    assert host == [(2, 4), (8,)] and len(kept) == 4
    for remat in ("none", "dots"):
        with pytest.raises(
            ValueError, match=rf"execution\.offload: q needs execution\.remat=attention, .* with {remat}"
        ):
            remat_policy(config.Execution(remat=remat, offload=("optimizer", "q")))
    assert remat_policy(config.Execution(offload=("optimizer",))) is layout.but_gathered


@pytest.mark.parametrize(
    ("remat", "axis_type"), [("none", "auto"), ("none", "explicit"), ("dots", "auto"), ("full", "auto")]
)
def test_weights_that_rest_cut_are_gathered_again_for_the_backward_pass(remat, axis_type):
    """Kept whole, those of all layers would lie on every device."""
    axes = {"up": ("embed", "ffn"), "down": ("ffn", "embed")}
    weights = {"up": jnp.ones((2, 16, 64)), "down": jnp.ones((2, 64, 16))}
    specs = {n: Spec(w.shape, ("layers", *axes[n]), None) for n, w in weights.items()}
    mesh = config.Mesh(fsdp=-1, axis_type=axis_type)
    how = layout.Layout.of(mesh, config.Execution("float32", scan=True, remat=remat))

    def block(p, x, *_):
        return x + layers.mlp(p, x, "silu", how), None

    def f(w, x):
        return block_stack.run_blocks(block, w, specs, x, shard=how, key=None)[0].sum()

    with on_mesh(m := make_mesh(mesh)):
        weights = jax.tree.map(jax.device_put, weights, how.shardings(specs, m))
        x = jax.device_put(jnp.ones((8, 4, 16)), NamedSharding(m, how.spec(("batch", "seq", None))))
        text = jax.jit(jax.grad(f)).lower(weights, x).compile().as_text()
    found = [c for c in hlo.Module(text, dict(m.shape)).collectives if c.kind == "all-gather"]
    assert sum(c.bytes * c.times for c in found) == 2 * 2 * 2 * 16 * 64 * 4  # twice two weights of two layers


def test_distances_fall_into_the_published_buckets():
    """Of T5 and MPNet with 32 up to 128: near ones alone, farther ones shared, keys ahead in the second half."""
    table, far = jnp.arange(32.0).reshape(32, 1), [0, 1, 7, 8, 11, 12, 15, 16, 31, 32, 127, 128, 999]

    def buckets(T, S, both_ways):
        mask = Mask(causal=False)
        how = dict(longest=128, both_ways=both_ways, shard=shard())
        bias = jax.jit(lambda table: attention_layers.relative_bias(table, mask, T, S, **how))(table)
        assert bias.shape == (1, 1, T, S)
        return np.asarray(bias)[0, 0].astype(int)

    shared = [0, 1, 7, 8, 8, 9, 9, 10, 11, 12, 15, 15, 15]
    assert buckets(1000, 1, True)[far, 0].tolist() == shared
    assert buckets(1, 1000, True)[0, far].tolist() == [0] + [16 + b for b in shared[1:]]
    assert buckets(1000, 1, False)[far, 0].tolist() == [0, 1, 7, 8, 11, 12, 15, 16, 21, 21, 31, 31, 31]
    assert not buckets(1, 1000, False).any()
    both = buckets(150, 150, True)
    assert (both[3, :147] == both[4, 1:148]).all() and both[9, 1] == 8 and both[1, 9] == 24


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("T", "S", "start"), [(5, 7, None), (9, 4, None), (2, 12, 6), (1, 1, None)])
def test_a_bias_of_distances_is_looked_up_for_every_query_and_key(T, S, start, both_ways):
    """Also where a few queries stand behind what a cache holds."""
    table_NH = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    mask = Mask(not both_ways) if start is None else Mask(True, at_T=start + np.arange(T), at_S=np.arange(S))
    how = dict(longest=10, both_ways=both_ways, shard=shard())
    got = jax.jit(lambda table: attention_layers.relative_bias(table, mask, T, S, **how))(table_NH)
    distance_TS = np.arange(S)[None] - np.arange(T)[:, None] - (start or 0)
    buckets = jax.jit(lambda distance_TS: attention_layers.relative_buckets(distance_TS, 8, 10, both_ways))
    expected = table_NH[np.asarray(buckets(distance_TS.astype(np.int32)))]
    np.testing.assert_array_equal(got, expected.transpose(2, 0, 1)[None])
