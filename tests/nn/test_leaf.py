"""Leaves answer for weights that are more than arrays; plain arrays get answers that change nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.layout import Layout
from jaxlm.nn.leaf import Leaf, Wrapped, cast, dense, is_leaf, leaf_of
from jaxlm.weights import quantized
from jaxlm.weights.adapters import low_rank


def test_a_plain_array_changes_nothing():
    w, y, shard = jnp.ones((2, 3)), jnp.arange(3.0), Layout()
    assert not is_leaf(w)
    assert leaf_of(w).after(y, shard) is y and leaf_of(w).dense_bias(y) is y
    assert leaf_of(w).parallel_branch(y, shard) is None and leaf_of(w).prefix_keys_values() is None
    assert dense(w.astype("bfloat16")).dtype == jnp.float32
    assert cast(w, jnp.bfloat16).dtype == jnp.bfloat16 and cast(jnp.ones(3, "int32"), jnp.bfloat16).dtype == "int32"


def test_a_wrapped_weight_multiplies_as_it_did():
    w, x = jnp.arange(6.0).reshape(2, 3), jnp.ones((1, 1, 2))
    leaf = Wrapped(w)
    assert leaf_of(leaf) is leaf
    y = Layout().einsum("btd,df->btf", x, leaf, "batch", "seq", "ffn")
    np.testing.assert_array_equal(y, x @ w)


def test_a_cast_reaches_into_leaves_but_not_into_scales():
    w = jnp.ones((64, 4))
    base = quantized.bound(quantized.nf4(w, 1, 1), 1)
    leaf = low_rank.LowRank(base, jnp.ones((64, 2)), jnp.ones((2, 4)), 1.0, 1)
    made = cast(leaf, jnp.bfloat16)
    assert made.a.dtype == made.b.dtype == jnp.bfloat16
    vectors = made.replace(e=jnp.full(2, 1.003), g=jnp.full(4, 1.003), m=jnp.full(4, 1.003))
    for name in ("e", "g", "m"):
        np.testing.assert_array_equal(getattr(cast(vectors, jnp.bfloat16), name), np.float32(1.003))
    assert (made.base.low.dtype, made.base.step.dtype, made.base.nf4.dtype) == (jnp.float32, jnp.float32, jnp.uint8)


@pytest.mark.parametrize("call", [
    lambda w: w.einsum("td,df->tf", jnp.ones((1, 2)), Layout(), None, None),
    lambda w: w.embed(jnp.ones((1, 2), int), Layout(), "vocab"),
    lambda w: w.gathered(None, Layout()),
    lambda w: w.dense(),
])  # fmt: skip
def test_what_a_leaf_can_not_do_is_an_error(call):
    with pytest.raises(NotImplementedError, match=r"^Leaf (can't|is no)"):
        call(Leaf())
