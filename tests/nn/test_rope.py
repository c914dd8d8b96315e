"""Rotary positions: a rotation by distance alone, precise far out, and read from every published form of config."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import rope

RNG = np.random.default_rng(0)


def turn(x, position: int):
    return rope.rotate(x, rope.table(rope.Rope(), x.shape[-1], jnp.full((1, 1), position, jnp.int32)))


def test_rope_keeps_lengths_and_depends_on_distance_alone():
    q, k = (jnp.asarray(RNG.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at: int, of: int) -> float:
        turned = [turn(x, p) for x, p in ((q, at), (k, of))]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), jnp.linalg.norm(q), rtol=1e-5)
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-3)
    assert score(7, 3) != pytest.approx(score(3, 7), rel=1e-2)
    np.testing.assert_allclose(turn(q, 0), q)


def test_rope_is_precise_far_out_in_bfloat16():
    """Angles are formed in float32: at position 4000 bfloat16 angles would be wrong by whole turns."""
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    far = turn(x, 4001).astype(jnp.float32)
    exact = turn(x.astype(jnp.float32), 4001)
    np.testing.assert_allclose(far, exact, atol=0.01)
