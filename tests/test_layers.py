"""The parts of a Transformer against their formulas, in float32 inside whatever the outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, layers, sharding

RNG = np.random.default_rng(0)
X = (3 * RNG.standard_normal((2, 5, 8)) + 1).astype(np.float32)
SCALE, BIAS = (RNG.standard_normal(8).astype(np.float32) for _ in range(2))


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def shard(**execution) -> sharding.Layout:
    return sharding.Layout(execution=config.Execution(**{"dtype": "float32"} | execution))


def test_norms():
    mean, var = X.mean(-1, keepdims=True), X.var(-1, keepdims=True)
    expected = (X - mean) / np.sqrt(var + 1e-5) * SCALE + BIAS
    np.testing.assert_allclose(layers.layer_norm(X, SCALE, BIAS, 1e-5), expected, atol=1e-5)
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


def test_rope_keeps_lengths_and_depends_on_distance_alone():
    q, k = (jnp.asarray(RNG.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at: int, of: int) -> float:
        turned = [layers.rope(x, jnp.full((1, 1), p, jnp.int32), 1e4) for x, p in ((q, at), (k, of))]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), jnp.linalg.norm(q), rtol=1e-5)
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-3)
    assert score(7, 3) != pytest.approx(score(3, 7), rel=1e-2)
    np.testing.assert_allclose(layers.rope(q, jnp.zeros((1, 1), jnp.int32), 1e4), q)


def test_rope_is_precise_far_out_in_bfloat16():
    """Angles are formed in float32: at position 4000 bfloat16 angles would be wrong by whole turns."""
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    far = layers.rope(x, jnp.full((1, 1), 4001, jnp.int32), 1e4).astype(jnp.float32)
    exact = layers.rope(x.astype(jnp.float32), jnp.full((1, 1), 4001, jnp.int32), 1e4)
    np.testing.assert_allclose(far, exact, atol=0.01)


def test_embed_adds_up_the_gradients_of_repeated_tokens_in_float32():
    table = jnp.zeros((4, 2))
    ids = jnp.zeros((1, 1000), jnp.int32)
    g = jax.grad(lambda w: layers.embed(w, ids, shard(dtype="bfloat16")).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(g[0], 1000.0)  # bfloat16 would stop at 256
    np.testing.assert_array_equal(g[1:], 0.0)


def test_dropout():
    x, key = jnp.ones((200, 200)), jax.random.key(0)
    y = layers.dropout(x, 0.25, key)
    assert float((y == 0).mean()) == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(y[y != 0], 1 / 0.75, rtol=1e-6)
    assert layers.dropout(x, 0.25, None) is x and layers.dropout(x, 0.0, key) is x
    assert layers.subkeys(None, 3) == [None] * 3
    assert layers.dropout(x.astype(jnp.bfloat16), 0.25, key).dtype == jnp.bfloat16


@pytest.mark.parametrize("scan", [True, False])
def test_blocks_run_in_order_each_with_its_own_key(scan):
    weights, specs = {"w": jnp.arange(1.0, 4.0)[:, None]}, {"w": sharding.Spec((3, 1), ("layers", None), None)}
    keys = []

    def block(p, x, key):
        if not scan:
            keys.append(jax.random.key_data(key).tolist())
        return 10 * x + p["w"]

    y = layers.run_blocks(block, weights, specs, jnp.zeros(1), shard=shard(scan=scan), key=jax.random.key(0))
    assert y.tolist() == [123.0]
    assert scan or len({tuple(k) for k in keys}) == 3


@pytest.mark.parametrize(("choice", "expected"), [(True, True), (False, False), (None, False)])
def test_layers_are_scanned_when_asked_and_by_default_where_loops_are_quick(choice, expected):
    assert layers.scanned(shard(scan=choice)) is expected


def test_full_rematerialization_keeps_no_activation_of_a_block():
    def kept(remat: str) -> int:
        def f(w, x):
            block = lambda p, x, k: jnp.tanh(x @ p["w"])  # noqa: E731
            specs = {"w": sharding.Spec((4, 8, 8), ("layers", None, None), None)}
            return layers.run_blocks(block, w, specs, x, shard=shard(scan=True, remat=remat), key=None).sum()

        _, back = jax.vjp(f, {"w": jnp.ones((4, 8, 8))}, jnp.ones((16, 8)))
        return sum(x.size for x in jax.tree.leaves(back) if hasattr(x, "size"))

    assert kept("full") < kept("dots") <= kept("none")
