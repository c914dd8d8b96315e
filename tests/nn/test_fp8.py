"""Products in fp8 are those of the rounded numbers, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import fp8, matmul
from jaxlm.nn.layout import Layout

LARGEST = {fp8.E4M3: 448.0, fp8.E5M2: 57344.0}


def rounded(x: np.ndarray, kind) -> np.ndarray:
    """NumPy's rounding with the largest power of two that keeps the tensor in range."""
    by = 2.0 ** np.floor(np.log2(LARGEST[kind] / np.abs(x).max()))
    return (x * by).astype(jnp.dtype(kind)).astype(np.float64) / by


def drawn(*shape: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(len(shape)).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("kind", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize("top", [1e-20, 0.875, 0.876, 1.0, 448.0, 450.0, 3e7])
def test_the_largest_magnitude_comes_to_the_upper_end_of_the_range(kind, top):
    made = fp8.scaled(jnp.asarray([top, -top / 3, 0.0], jnp.float32), kind)
    numbers = np.asarray(made.numbers, np.float64)
    assert LARGEST[kind] / 2 <= np.abs(numbers).max() <= LARGEST[kind]
    np.testing.assert_allclose(numbers * float(made.unit), [top, -top / 3, 0], rtol=0.125)
    assert np.frexp(float(made.unit))[0] == 0.5  # a power of two: scaling rounds nothing


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_the_whole_product_so(wrong):
    assert np.isnan(fp8.scaled(jnp.asarray([1.0, wrong]), fp8.E5M2).unit)
    assert float(fp8.scaled(jnp.zeros(2), fp8.E4M3).numbers[0]) == 0


@pytest.mark.parametrize(
    ("eq", "x_shape", "w_shape", "back"),
    [
        ("btd,df->btf", (2, 3, 8), (8, 5), ("btf,df->btd", "btd,btf->df")),
        ("btd,dhc->bthc", (2, 3, 8), (8, 2, 3), ("bthc,dhc->btd", "btd,bthc->dhc")),
        ("bthc,hcd->btd", (2, 3, 2, 4), (2, 4, 6), ("btd,hcd->bthc", "bthc,btd->hcd")),
    ],
)
def test_a_product_and_its_gradients_are_those_of_rounded_factors(eq, x_shape, w_shape, back):
    x, w = drawn(*x_shape), drawn(*w_shape, size=0.02)

    def product(x, w):
        return Layout().einsum(eq, x, matmul.NarrowMatrix(w, matmul.Activations(fp8.WAY)), None, None, None)

    y, pull = jax.vjp(product, x, w)
    g = drawn(*y.shape, size=3e-5)
    x8, w8, g8 = rounded(x, fp8.E4M3), rounded(w, fp8.E4M3), rounded(g, fp8.E5M2)
    dx, dw = pull(jnp.asarray(g))
    for got, expected in ((y, (eq, x8, w8)), (dx, (back[0], g8, w8)), (dw, (back[1], x8, g8))):
        exact = np.einsum(*expected)
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
