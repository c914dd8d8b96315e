"""Multiplies rows by the matrix of their group, by the kernel in interpretation and in blocks, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.kernels import grouped_matmul
from jaxlm.planning import count_flops

G, D, F = 5, 192, 320
SIZES = np.array([100, 0, 201, 7, 76], np.int32)  # 384 rows; the last 128 belong to no group


@pytest.fixture
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "choose", lambda: grouped_matmul.GroupedMatmulChoice("kernel", ""))
    monkeypatch.setattr(grouped_matmul, "INTERPRET", True)
    monkeypatch.setattr(grouped_matmul, "WIDTH", 128)  # which divides neither side of the matrices


def by_loop(x, w):
    begins = np.cumsum(SIZES) - SIZES
    return jnp.concatenate([x[b : b + n] @ w[g] for g, (b, n) in enumerate(zip(begins, SIZES, strict=True))])


def test_the_kernel_gives_products_and_both_gradients(on_a_tpu):
    r = np.random.default_rng(0)
    x, w = (r.standard_normal(s).astype(np.float32) for s in ((512, D), (G, D, F)))
    dy = r.standard_normal((384, F)).astype(np.float32)

    def run(f):
        def loss(x, w):
            y = f(x, w)[:384]
            return (y * dy).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, w)

    got, y = run(lambda x, w: grouped_matmul.dot(x, w, SIZES, 128))
    (dx, dw), expected = run(by_loop)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(got[0][:384], dx[:384], atol=1e-4)
    np.testing.assert_allclose(got[1], dw, atol=1e-3)
    assert not np.asarray(got[1][1]).any()  # the group without rows


@pytest.mark.parametrize(("rows", "groups", "kernel", "size"), [
    (8192, 8, True, 512), (49152, 128, True, 256), (2, 8, True, 128), (8192, 8, False, 128), (2, 8, False, 8),
])  # fmt: skip
def test_blocks_hold_no_more_than_a_groups_share(rows, groups, kernel, size, monkeypatch):
    choice = grouped_matmul.GroupedMatmulChoice("kernel" if kernel else "blocks", "")
    monkeypatch.setattr(grouped_matmul, "choose", lambda: choice)
    assert grouped_matmul.block_size(rows, groups) == size


def test_planned_flops_are_of_the_blocks_and_not_of_all_groups():
    """Though how many blocks run is data."""

    def one(w, x):
        return x @ w

    def f(w, x):
        return grouped_matmul.in_blocks(one, 32, w, x, jnp.array([0, 2, 2, 4]), jnp.int32(3))

    w, x = jnp.ones((G, D, D)), jnp.ones((4 * 32, D))
    y = f(w, x)
    assert np.asarray(y[:96] == D).all() and not np.asarray(y[96:]).any()
    once = 2 * x.size * D
    assert count_flops.count(jax.make_jaxpr(f)(w, x)) == once
    assert count_flops.count(jax.make_jaxpr(jax.grad(lambda *a: f(*a).sum(), (0, 1)))(w, x)) == 4 * once
