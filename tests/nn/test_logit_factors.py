"""Logits are told apart into states and a head, or it is said why they can't be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.layout import Layout
from jaxlm.nn.logit_factors import depends, logit_factors
from jaxlm.nn.losses import Readout, logits

V, D = 7, 4
FITS = {
    "a product": lambda x, w, b: x @ w,
    "an einsum with a table": lambda x, w, b: jnp.einsum("btd,vd->btv", x, w.T),
    "a bias, then a factor": lambda x, w, b: (x @ w + b[None, None]) * 3.0,
    "a factor, then a bias": lambda x, w, b: b[None, None] + x @ w / jnp.sqrt(x.shape[-1]),
    "a softcap": lambda x, w, b: 5.0 * jnp.tanh((x @ w * 0.5 + b[None, None]) / 5.0),
    "other dtypes": lambda x, w, b: (x @ w).astype(jnp.bfloat16).astype(jnp.float32),
    "one dimension of tokens": lambda x, w, b: (x.reshape(-1, D) @ w + b[None]).reshape(*x.shape[:2], V),
    "jitted": lambda x, w, b: jax.jit(lambda x: jax.jit(jnp.matmul)(jax.nn.gelu(x), w) + b[None, None])(x),
}


@pytest.mark.parametrize("case", FITS)
def test_the_factors_make_the_same_logits(case):
    rng = np.random.default_rng(0)
    x, w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, D), (D, V), (V,)))
    run = lambda x, w, b: FITS[case](jnp.sin(x), w, b)  # noqa: E731
    f = logit_factors(jax.make_jaxpr(run)(x, w, b))
    (states,) = jax.extend.core.jaxpr_as_fun(f.states)(x, w, b)
    assert f.head == 1 and f.bias in (None, 2)
    assert not any("dot_general" in str(e.primitive) for e in f.states.jaxpr.eqns), "the product would be made twice"
    bias = None if f.bias is None else jnp.asarray(b) * f.bias_scale
    r = Readout(states.reshape(2, 3, D) * f.scale, jnp.asarray(w if f.vocab_first else w.T), bias, f.softcap)
    tolerance = 1e-2 if case == "other dtypes" else 1e-6
    np.testing.assert_allclose(logits(r, Layout()), run(x, w, b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda x, w, b: jnp.maximum(x @ w, 0), "max comes between"),
        (lambda x, w, b: x @ w * b[None, None], "mul comes between"),
        (lambda x, w, b: x @ w + x[..., :1], "add comes between"),
        (lambda x, w, b: x @ w + b[None, None] + b[None, None], "add comes between"),
        (lambda x, w, b: jnp.tanh(jnp.tanh(x @ w)), "tanh comes between"),
        (lambda x, w, b: x @ jnp.exp(w), "not that of states with a weight"),
        (lambda x, w, b: jnp.einsum("btd,bsd->bts", x, x), "not that of states with a weight"),
        (lambda x, w, b: x, "no product at all"),
    ],
)
def test_what_is_no_product_is_told(run, why):
    x, w, b = jnp.ones((2, 3, D)), jnp.ones((D, V)), jnp.ones(V)
    with pytest.raises(ValueError, match=why):
        logit_factors(jax.make_jaxpr(run)(x, w, b))


def test_what_a_result_depends_on():
    program = jax.make_jaxpr(lambda a, b: (a + 1, b * 2, 3.0, a * b))(1.0, 2.0)
    assert depends(program, {0}) == [True, False, False, True] and depends(program, {1}) == [False, True, False, True]
