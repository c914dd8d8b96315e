"""The outer optimizers and the compression of deltas, alone: what they compute, held to definitions written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.distributed import Outer
from jaxlm.training.distributed import compression, outer


def tree(seed: int, size: float = 1.0) -> dict:
    draw = np.random.default_rng(seed)
    return {"a": {"w": jnp.asarray(size * draw.normal(size=(3, 5)), jnp.float32)},
            "b": jnp.asarray(size * draw.normal(size=7), jnp.float32)}  # fmt: skip


def all_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, tolerance=1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("c", [Outer("average"), Outer("sgd", lr=1.0, momentum=0.0), Outer("nesterov", 1.0, 0.0)])
def test_a_rate_of_one_without_momentum_gives_the_workers_weights_to_the_bit(c) -> None:
    start, target = tree(0), tree(1, 1e-4)
    weights, _ = outer.update(c, start, outer.init(c, start), target)
    all_equal(weights, target)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_that_of_optax(nesterov) -> None:
    c = Outer("nesterov" if nesterov else "sgd", lr=0.7, momentum=0.9)
    weights, state = tree(0), outer.init(c, tree(0))
    tx = optax.sgd(0.7, momentum=0.9, nesterov=nesterov)
    expected, peer = tree(0), tx.init(tree(0))
    for i in range(1, 5):
        delta = tree(i)
        weights, state = outer.update(c, weights, state, jax.tree.map(jnp.subtract, weights, delta))
        updates, peer = tx.update(delta, peer)
        expected = optax.apply_updates(expected, updates)
    close(weights, expected, 1e-5)


def test_adam_is_that_of_optax() -> None:
    c = Outer("adam", lr=1e-2, momentum=0.9, beta2=0.99, eps=1e-3)
    weights, state = tree(0), outer.init(c, tree(0))
    tx = optax.adam(1e-2, b1=0.9, b2=0.99, eps=1e-3)
    expected, peer = tree(0), tx.init(tree(0))
    for i in range(1, 5):
        weights, state = outer.update(c, weights, state, jax.tree.map(jnp.subtract, weights, tree(i)))
        updates, peer = tx.update(tree(i), peer)
        expected = optax.apply_updates(expected, updates)
    close(weights, expected, 1e-5)


def test_pushes_of_delayed_nesterov_are_one_nesterov_step_on_their_mean() -> None:
    many, one = Outer("delayed_nesterov", lr=0.7, momentum=0.9, delay=3), Outer("nesterov", lr=0.7, momentum=0.9)
    weights = expected = tree(0)
    state, peer = outer.init(many, weights), outer.init(one, expected)
    for turn in range(3):
        deltas = [tree(10 * turn + i + 1) for i in range(3)]
        for delta in deltas:
            weights, state = outer.update(many, weights, state, jax.tree.map(jnp.subtract, weights, delta))
        mean = jax.tree.map(lambda *d: sum(d) / 3, *deltas)
        expected, peer = outer.update(one, expected, peer, jax.tree.map(jnp.subtract, expected, mean))
        close(weights, expected, 1e-5)


def test_staleness_and_local_steps() -> None:
    assert outer.staleness_weight(0, 0.5) == 1
    assert outer.staleness_weight(3, 0.5) == pytest.approx(0.5)
    assert outer.staleness_weight(7, 0.0) == 1
    assert outer.local_steps({"a": 2.0, "b": 1.0, "c": 0.01}, 30) == {"a": 30, "b": 15, "c": 1}
    assert outer.local_steps({"a": 0.0}, 30) == {"a": 30}


KINDS = list(compression.BITS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 256, 1000])
def test_compressed_numbers_are_near_and_as_large_as_said(kind, count) -> None:
    x = jnp.asarray(np.random.default_rng(count).normal(size=count), jnp.float32)
    packed = compression.compress(kind, x)
    assert sum(leaf.nbytes for leaf in packed.values()) == compression.size(kind, count)
    back = compression.decompress(kind, packed, count)
    assert back.dtype == jnp.float32
    worst = {"none": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127, "float4": 1 / 6}[kind]  # of the largest number
    assert float(jnp.max(jnp.abs(back - x))) <= worst * float(jnp.max(jnp.abs(x))) + 1e-7


def test_numbers_that_four_bits_can_hold_are_kept() -> None:
    x = jnp.asarray([*compression.FLOAT4, *(-v for v in compression.FLOAT4)]) / 3
    back = compression.decompress("float4", compression.compress("float4", x), x.size)
    np.testing.assert_allclose(back, x, rtol=1e-6)
    zeros = jnp.zeros(300)
    for kind in KINDS:
        all_equal(compression.decompress(kind, compression.compress(kind, zeros), 300), zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_error_feedback_loses_nothing_in_the_sum(kind) -> None:
    draw = np.random.default_rng(0)
    error, arrived, meant = jnp.zeros(600), jnp.zeros(600), jnp.zeros(600)
    for _ in range(20):
        delta = jnp.asarray(draw.normal(size=600), jnp.float32)
        packed, error = compression.with_feedback(kind, delta, error, 1.0)
        arrived, meant = arrived + compression.decompress(kind, packed, 600), meant + delta
    np.testing.assert_allclose(arrived + error, meant, atol=1e-4)
    lossy, _ = compression.with_feedback(kind, delta, jnp.ones(600), 0.0)
    all_equal(lossy, compression.compress(kind, delta))
