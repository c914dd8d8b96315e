"""Products in MXFP8 are those of numbers of which 32 along the contracted dimension share a power of two, and their
gradients too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.core.spec import Spec
from jaxlm.nn import matmul, mxfp8
from jaxlm.nn.layout import Layout
from jaxlm.nn.remat import remat_policy
from jaxlm.planning import count_flops
from jaxlm.runtime import mesh
from jaxlm.runtime.mesh import Described

B200 = Described("gpu", "NVIDIA B200")
SHAPES = [
    ("btd,df->btf", (2, 16, 64), (64, 96), ("btf,df->btd", "btd,btf->df")),
    ("btd,dhc->bthc", (3, 5, 40), (40, 2, 7), ("bthc,dhc->btd", "btd,bthc->dhc")),  # nothing that 32 divides
    ("bthc,hcd->btd", (2, 3, 3, 20), (3, 20, 1), ("btd,hcd->bthc", "bthc,btd->hcd")),  # blocks over two heads
]


def drawn(*shape: int, size: float = 1.0) -> np.ndarray:
    """Numbers whose magnitudes differ between blocks by powers of ten."""
    rng = np.random.default_rng(len(shape))
    return (size * rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)).astype(np.float32)


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NumPy's rounding of a matrix `[R, K]`, in blocks along K of which the last may be short, and its error at most:
    half of the last of e4m3's three digits after the first, or of the least number."""
    out, error = np.zeros(x.shape), np.zeros(x.shape)
    for start in range(0, x.shape[1], 32):
        part = x[:, start : start + 32]
        by = 2.0 ** np.floor(np.log2(448.0 / np.abs(part).max(1, keepdims=True)))
        out[:, start : start + 32] = (part * by).astype(jnp.float8_e4m3fn).astype(np.float64) / by
        error[:, start : start + 32] = np.maximum(np.abs(part) * 2.0**-4, 2.0**-10 / by)
    return out, error


def product(eq: str, x, w):
    return Layout().einsum(eq, x, matmul.NarrowMatrix(w, matmul.Activations(mxfp8.WAY)), *[None] * x.ndim)


@pytest.mark.parametrize(("eq", "x_shape", "w_shape", "back"), SHAPES)
def test_a_product_and_its_gradients_are_those_of_rounded_factors(eq, x_shape, w_shape, back):
    x, w = drawn(*x_shape), drawn(*w_shape, size=0.02)
    y, pull = jax.vjp(lambda x, w: product(eq, x, w), x, w)
    g = drawn(*y.shape, size=3e-5)
    inputs = len(set(eq.split(",")[0]) & set(eq.split(",")[1].split("->")[0]))
    w2 = w.reshape(np.prod(w.shape[:inputs]), -1)
    x2, g2 = x.reshape(-1, len(w2)), g.reshape(-1, w2.shape[1])
    dx, dw = pull(jnp.asarray(g))
    for got, (a, b) in ((y, (x2, w2.T)), (dx, (g2, w2)), (dw, (x2.T, g2.T))):
        (a8, a_error), (b8, b_error) = rounded(a), rounded(b)
        exact = a8 @ b8.T
        np.testing.assert_allclose(got, exact.reshape(got.shape), rtol=1e-5, atol=1e-5 * np.abs(exact).max())
        bound = a_error @ np.abs(b).T + np.abs(a) @ b_error.T + a_error @ b_error.T
        apart = np.abs(np.asarray(got, np.float64).reshape(exact.shape) - np.float64(a) @ np.float64(b).T)
        assert (apart <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("top", [1e-30, 0.875, 0.876, 1.0, 448.0, 450.0, 3e38])
def test_the_largest_magnitude_of_a_block_comes_to_the_upper_end_of_the_range(top):
    x = np.asarray([[top, -top / 3] + [0.0] * 30 + [1.0] * 32], np.float32)
    made = mxfp8.blocks(jnp.asarray(x))
    numbers, units = (np.asarray(a, np.float64) for a in (made.numbers, made.units))
    assert 224 <= np.abs(numbers[0, :32]).max() <= 448 and units.shape == (1, 2) and units[0, 1] == 2.0**-8
    np.testing.assert_allclose(numbers[0, :2] * units[0, 0], [top, -top / 3], rtol=2.0**-4)
    assert np.frexp(units[0, 0])[0] == 0.5


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_its_rows_so(wrong):
    x, w, g = drawn(40, 70), drawn(70, 5), np.ones((40, 5), np.float32)
    x[7, 50] = wrong
    y, pull = jax.vjp(lambda x, w: product("td,df->tf", x, w), jnp.asarray(x), jnp.asarray(w))
    assert np.isnan(y[7]).all() and np.isfinite(np.delete(y, 7, 0)).all()
    assert np.isnan(pull(jnp.asarray(g))[1][50]).all()
    g[3, 2] = wrong
    dx, dw = pull(jnp.asarray(g))
    assert np.isnan(dx[3]).all() and np.isfinite(np.delete(dx, 3, 0)).all() and np.isnan(dw[:, 2]).all()


def test_zeros_are_zeros():
    zero, w = jnp.zeros((3, 40)), jnp.asarray(drawn(40, 5))
    y, pull = jax.vjp(lambda x, w: product("td,df->tf", x, w), zero, w)
    assert not y.any() and not any(d.any() for d in pull(jnp.zeros_like(y)))


def test_a_program_for_blackwell_has_scaled_products_alone_and_their_flops_are_counted():
    x, w = jnp.zeros((64, 96), jnp.bfloat16), jnp.zeros((96, 32), jnp.bfloat16)

    def both(x, w):
        y, pull = jax.vjp(lambda x, w: product("td,df->tf", x, w), x, w)
        return pull(y)

    with mesh.on_devices([B200]):
        traced = jax.jit(both).trace(x, w)
    text = str(traced.jaxpr)
    assert text.count(f"{mxfp8.PRIMITIVE}[") == 3 and "dot_general" not in text
    assert count_flops.count(traced.jaxpr) == count_flops.count(traced.jaxpr, narrow=True) == 3 * 2 * 64 * 96 * 32


@pytest.mark.parametrize(("remat", "times"), [("dots", 3), ("full", 4)])
def test_scaled_products_are_kept_where_products_are(remat, times):
    policy = remat_policy(config.Execution(remat=remat))
    layer = jax.checkpoint(lambda x, w: jnp.sin(product("td,df->tf", x, w)), policy=policy)
    with mesh.on_devices([B200]):
        traced = jax.make_jaxpr(jax.grad(lambda x, w: layer(x, w).sum(), (0, 1)))(
            jnp.ones((64, 96)), jnp.ones((96, 32))
        )
    assert str(traced).count(f"{mxfp8.PRIMITIVE}[") == times


@pytest.mark.parametrize(("outputs", "whole"), [(32, True), (64, False)])
def test_no_block_lies_on_two_devices(outputs, whole, monkeypatch):
    """Of the gradient of activations, which contracts outputs that two devices share, units would be missing there."""
    monkeypatch.setattr(mxfp8, "platform", lambda: "gpu")
    sizes, x, w = config.Mesh(tensor=2), jnp.ones((8, 32, 40)), jnp.ones((40, outputs))
    shard, s = Layout.of(sizes, config.Execution(dtype="float32")), Spec(w.shape, ("embed", "ffn"), spec.zeros)

    def both(x, w):
        narrow = dataclasses.replace(shard, narrow=matmul.Activations(mxfp8.WAY))
        y, pull = jax.vjp(
            lambda x, w: narrow.einsum("btd,df->btf", x, narrow.gather(w, s), "batch", "seq", "ffn"), x, w
        )
        return pull(y)

    with mesh.on_mesh(mesh.make_mesh(sizes)):
        lines = str(jax.make_jaxpr(both)(x, w)).splitlines()
    held = [line for line in lines if "sharding_constraint" in line and ":f8_e8m0fnu" in line]
    assert len(held) == (2 if whole else 0)
