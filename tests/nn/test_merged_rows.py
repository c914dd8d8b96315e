"""Kernels without a rule for vmap: one call with all rows gives what each by itself gives, and so do its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import attention
from jaxlm.nn.mask import Mask
from jaxlm.nn.merged_rows import with_merged_rows
from jaxlm.runtime import mesh


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def test_merged_rows_and_their_gradients_are_those_of_each() -> None:
    rows: list[int] = []

    def kernel(x, w, seen):
        rows.append(x.shape[0])
        return jnp.where(seen, jnp.tanh(x) * w, 0.0)

    def plain(x, w, seen):
        return jnp.sum(kernel(x, w, seen) ** 2)

    def merged(x, w, seen):
        return jnp.sum(with_merged_rows(kernel)(x, w, seen) ** 2)

    x, w, seen = draw(3, 2, 5), draw(3, 2, 5), draw(1, 5) > 0  # the mask is the same for all
    expected = jax.vmap(jax.grad(plain, (0, 1)), (0, 0, None))(x, w, seen)
    rows.clear()
    found = jax.jit(jax.vmap(jax.grad(merged, (0, 1)), (0, 0, None)))(x, w, seen)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert 6 in rows and max(rows) == 6


@pytest.mark.parametrize("bias", [False, True])
def test_a_mask_that_heads_share_is_mapped_over_workers(monkeypatch, bias) -> None:
    """With XLA in the place of cuDNN, whose rule in JAX refuses such a mask: it needs as many heads as queries have."""
    plain, called = jax.nn.dot_product_attention, []

    def kernel(q, *rest, implementation, **more):
        called.append((implementation, q.shape[0]))
        return plain(q, *rest, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v = draw(2, 3, 8, 4, 16), draw(2, 3, 8, 2, 16), draw(2, 3, 8, 2, 17)[..., :16]
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, 3, 8)), -1), jnp.int32)
    added = draw(2, 1, 4, 8, 8) if bias else None  # one row for all of a worker's

    def loss(q, k, v, added, segments, run):
        mask = Mask(True, segments_BS=segments, segments_BT=segments)
        return jnp.sum(run(q, k, v, mask, 0.25, None, added, None) ** 2)

    def xla(*a):
        return attention._xla(*a, in_blocks=False)

    which = (0, 1, 2, 3) if bias else (0, 1, 2)
    expected = jax.vmap(lambda *a: jax.grad(loss, which)(*a, xla))(q, k, v, added, segments)
    with mesh.mapped_over_replica():
        found = jax.jit(jax.vmap(lambda *a: jax.grad(loss, which)(*a, attention._cudnn)))(q, k, v, added, segments)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert ("cudnn", 6) in called
