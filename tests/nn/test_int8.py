"""Products in int8 are those of numbers rounded by row and by output, and the gradient of a matrix is not rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config
from jaxlm.nn import int8, matmul
from jaxlm.nn.layout import Layout
from jaxlm.nn.remat import remat_policy

CASES = [
    ("btd,df->btf", (2, 3, 8), (8, 5), ("btf,df->btd", "btd,btf->df")),
    ("btd,dhc->bthc", (2, 3, 7), (7, 2, 3), ("bthc,dhc->btd", "btd,bthc->dhc")),
    ("bthc,hcd->btd", (2, 3, 2, 4), (2, 4, 6), ("btd,hcd->bthc", "bthc,btd->hcd")),
]


def rounded(x: np.ndarray, over: tuple[int, ...]) -> np.ndarray:
    """NumPy's rounding to 127 steps of the largest magnitude over these dimensions."""
    unit = (np.abs(x).max(over, keepdims=True) / np.float32(127)).astype(np.float32)
    return np.round(x / unit).astype(np.float64) * unit


def drawn(*shape: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(len(shape)).standard_normal(shape)).astype(np.float32)


def product(eq: str, x, w):
    return Layout().einsum(eq, x, matmul.NarrowMatrix(w, matmul.Activations(int8.WAY)), *[None] * x.ndim)


@pytest.mark.parametrize(("eq", "x_shape", "w_shape", "back"), CASES)
def test_a_product_and_its_gradients_are_those_of_the_formula(eq, x_shape, w_shape, back):
    x, w = drawn(*x_shape), drawn(*w_shape, size=0.02)
    y, pull = jax.vjp(lambda x, w: product(eq, x, w), x, w)
    g = drawn(*y.shape, size=3e-5)
    inputs = len(set(eq.split(",")[0]) & set(eq.split(",")[1].split("->")[0]))
    ins, outs = tuple(range(inputs)), tuple(range(inputs, w.ndim))
    last = lambda a, n: tuple(range(a.ndim - n, a.ndim))  # noqa: E731
    dx, dw = pull(jnp.asarray(g))
    for got, expected in (
        (y, (eq, rounded(x, last(x, inputs)), rounded(w, ins))),
        (dx, (back[0], rounded(g, last(g, len(outs))), rounded(w, outs))),
        (dw, (back[1], np.float64(x), np.float64(g))),
    ):
        exact = np.einsum(*expected)
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(("K", "dtype"), [(1, "float32"), (33, "float32"), (4096, "float32"), (512, "bfloat16")])
def test_the_error_is_at_most_that_of_half_a_step_of_each_factor(K, dtype):
    """A step is a row's or an output's largest magnitude over 127; the result's own type rounds too."""
    x, w = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (drawn(5, K), drawn(K, 1, 3)[:, 0]))
    got = np.asarray(product("td,df->tf", jnp.asarray(x, dtype), jnp.asarray(w, dtype)), np.float64)
    half_x, half_w = np.abs(x).max(1, keepdims=True) / 254, np.abs(w).max(0, keepdims=True) / 254
    bound = np.abs(x) @ (0 * w + half_w) + (0 * x + half_x) @ np.abs(w) + K * half_x * half_w
    assert (np.abs(got - x @ w) <= bound + 2 * float(jnp.finfo(dtype).eps) * np.abs(x @ w)).all()


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_its_row_or_output_so(wrong):
    x, w = drawn(3, 4), drawn(4, 5)
    spoilt, column = x.copy(), w.copy()
    spoilt[1, 2] = column[0, 3] = wrong
    y = np.asarray(product("td,df->tf", jnp.asarray(spoilt), jnp.asarray(w)))
    assert not np.isfinite(y[1]).any() and np.isfinite(y[[0, 2]]).all()
    y = np.asarray(product("td,df->tf", jnp.asarray(x), jnp.asarray(column)))
    assert not np.isfinite(y[:, 3]).any() and np.isfinite(y[:, :3]).all()
    _, pull = jax.vjp(lambda x, w: product("td,df->tf", x, w), jnp.asarray(x), jnp.asarray(w))
    g = np.ones((3, 5), np.float32)
    g[2, 1] = wrong
    dx, dw = pull(jnp.asarray(g))
    assert not np.isfinite(dx[2]).any() and np.isfinite(dx[:2]).all() and not np.isfinite(dw[:, 1]).any()


def test_zeros_are_zeros():
    zero, w = jnp.zeros((3, 4)), jnp.asarray(drawn(4, 5))
    y, pull = jax.vjp(lambda x, w: product("td,df->tf", x, w), zero, w)
    assert not y.any() and not any(d.any() for d in pull(jnp.zeros_like(y)))


def test_products_are_of_whole_numbers_but_for_the_gradient_of_the_matrix():
    x, w = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((8, 3), jnp.bfloat16)
    program = jax.jit(lambda x, w, g: jax.vjp(lambda x, w: product("td,df->tf", x, w), x, w)[1](g))
    text = program.lower(x, w, jnp.zeros((4, 3), jnp.bfloat16)).as_text()
    found = [line.split(" : ")[-1] for line in text.splitlines() if "dot_general" in line]
    assert sorted("i8" in line and "i32" in line for line in found) == [False, True], found


@pytest.mark.parametrize(("remat", "times"), [("dots", 2), ("full", 3)])
def test_scaled_products_are_kept_where_products_are(remat, times):
    policy = remat_policy(config.Execution(remat=remat))
    layer = jax.checkpoint(lambda x, w: jnp.sin(product("td,df->tf", x, w)), policy=policy)
    traced = jax.make_jaxpr(jax.grad(lambda x, w: layer(x, w).sum(), (0, 1)))(jnp.ones((4, 8)), jnp.ones((8, 3)))
    assert str(traced).count("preferred_element_type=int32") == times
