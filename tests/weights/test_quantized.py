"""Weights of few bits: how near, how small, and that products with them are products with what they stand for."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.core.compression import Format, stored
from jaxlm.core.spec import Spec, normal
from jaxlm.nn import leaf
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import make_mesh
from jaxlm.weights import quantized
from jaxlm.weights.compress import formats

SHAPE, INS, OUTS = (2, 128, 4, 24), 1, 2  # layers, D, H, C


def weight(shape=SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def held(kind: str, w: jax.Array, ins: int = INS, outs: int = OUTS) -> dict:
    return jax.jit(lambda w: quantized.KINDS[kind](w, ins, outs))(w)


def test_nf4_takes_the_nearest_code_and_four_bits():
    w = np.asarray(weight())
    q = held("nf4", weight())
    found = np.asarray(quantized.bound(q, OUTS).dense())
    blocks = w.reshape(2, 2, 64, 4, 24)
    scale = np.abs(blocks).max(2, keepdims=True)
    codes = np.array(quantized.NF4)
    nearest = codes[np.abs(blocks[..., None] / scale[..., None] - codes).argmin(-1)] * scale
    # The scales are rounded too, to one of 256 steps, which moves a number near the middle between two codes.
    assert np.mean(np.abs(found - nearest.reshape(w.shape)) > 0.02) < 0.01
    assert np.sqrt(np.mean((found - w) ** 2)) == pytest.approx(0.093, abs=0.003), "of a deviation of 1"
    bits = 8 * sum(x.nbytes for x in q.values()) / w.size
    assert 4.125 <= bits < 4.2
    assert q["nf4"].dtype == q["scale"].dtype == jnp.uint8


def test_the_first_of_two_codes_is_the_high_half_of_a_byte():
    w = jnp.zeros((1, 64, 1)).at[0, 0, 0].set(1.0).at[0, 1, 0].set(-1.0)
    q = held("nf4", w, 1, 1)
    assert int(q["nf4"][0, 0, 0]) == 15 << 4 | 0
    np.testing.assert_allclose(quantized.bound(q, 1).dense()[0, :3, 0], [1, -1, 0], atol=1e-6)


def test_an_outlier_spoils_its_own_block_alone():
    w = weight((1, 256, 8)).at[0, 3, :].mul(50)
    apart = np.abs(np.asarray(quantized.bound(held("nf4", w, 1, 1), 1).dense() - w))
    assert apart[0, 64:].max() < 0.6 < apart[0, :64].max()


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("bfloat16", 0.002)])
def test_other_kinds_are_nearer(kind, error):
    q = held(kind, weight())
    w = leaf.dense(quantized.bound(q, OUTS) if isinstance(q, dict) else q)
    assert float(jnp.sqrt(jnp.mean((w - weight()) ** 2))) < error


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_products_and_their_gradients_are_those_of_what_it_stands_for(kind):
    w = quantized.bound(jax.tree.map(lambda x: x[0], held(kind, weight())), OUTS)
    x = jax.random.normal(jax.random.key(1), (2, 8, 128))
    shard = Layout(execution=config.Execution(dtype="float32"))

    def f(x, w):
        return jnp.sin(shard.einsum("btd,dhc->bthc", x, w, "batch", "seq", "heads", None)).sum()

    got, expected = (jax.jit(jax.value_and_grad(f))(x, v) for v in (w, w.dense()))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_rests_sharded_as_the_weight_would(kind):
    s = Spec(SHAPE, ("layers", "embed", "heads", None), normal(1.0))
    specs = quantized.specs(s, INS, OUTS, kind)
    mesh = make_mesh(config.Mesh(data=1, fsdp=2, tensor=4))
    layout = Layout()
    homes = layout.shardings(specs, mesh)
    q = held(kind, weight())
    assert {n: (x.shape, x.dtype) for n, x in q.items()} == {
        n: (x.shape, x.dtype) for n, x in spec.abstract(specs).items()
    }
    codes = jax.device_put(q, homes)[kind]
    assert codes.addressable_shards[0].data.size == codes.size // 8


def test_an_odd_number_of_inputs_is_refused():
    with pytest.raises(ValueError, match="nf4: 7 inputs have no even number to share a byte; leave base=bfloat16"):
        quantized.nf4(jnp.zeros((1, 7, 4)), 1, 1)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="XLA of jax 0.10 takes barriers away before it moves what loops don't change"
)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_loop_over_tokens_holds_no_dense_copies(kind: Any) -> None:
    """Compilers move what doesn't change in a loop out of it, which would be every weight's numbers."""
    w, n = jax.random.normal(jax.random.key(0), (128, 128)), 16
    leaves = [formats.nearest(Format(kind), w, (128,), (128,)) for _ in range(n)]

    def tokens(x: jax.Array, leaves: Any) -> jax.Array:
        def step(_: Any, x: jax.Array) -> jax.Array:
            for one in leaves:
                x = one.einsum("bd,df->bf", x, Layout(), None, None)
            return x

        return jax.lax.fori_loop(0, 9, step, x)

    used = jax.jit(tokens).lower(jnp.ones((1, 128)), leaves).compile().memory_analysis()
    assert used.temp_size_in_bytes < n / 2 * w.nbytes


@pytest.mark.parametrize(("kind", "worst", "types"), [
    ("int8", 0.01, r"tensor<6x24xi8>, tensor<24x24xi8>\) -> tensor<6x24xi32>"),
    ("fp8", 0.06, r"tensor<6x24xf8E4M3FN>, tensor<24x24xf8E4M3FN>\) -> tensor<6x24xf32>"),
])  # fmt: skip
def test_inputs_are_rounded_row_by_row_where_a_format_says_so(kind, worst, types):
    w = jax.random.normal(jax.random.key(0), (24, 24))
    small = formats.nearest(Format(kind, dynamic=True), w, (24,), (4, 6))
    plain = small.replace(dynamic=False)
    x = jax.random.normal(jax.random.key(1), (2, 3, 24)).at[0, 1].mul(1e4).at[1, 2].set(0)
    shard = Layout(execution=config.Execution(dtype="float32"))
    product = lambda x, w: w.einsum("btd,dhc->bthc", x, shard, "batch", "seq", "heads", None)  # noqa: E731
    found, expected = np.asarray(product(x, small)), np.asarray(product(x, plain))
    apart = np.linalg.norm(found - expected, axis=(2, 3)) / np.maximum(np.linalg.norm(expected, axis=(2, 3)), 1e-9)
    assert 0 < apart.max() < worst, "a row of large inputs rounds its own alone"
    assert not found[1, 2].any()
    assert re.search(types, jax.jit(product).lower(x, small).as_text()), "eight bits are multiplied as such"
    slopes = [jax.grad(lambda x, w=w: (product(x, w) * expected).sum())(x) for w in (small, plain)]
    np.testing.assert_allclose(*slopes, rtol=1e-5)


def test_formats_whose_inputs_are_rounded_are_told_by_name():
    assert [str(stored(text)) for text in ("int8:dynamic", "fp8:dynamic:scaled")] == [
        "int8:dynamic",
        "fp8:dynamic:scaled",
    ]
    for text in ("int4:128:dynamic", "fp8:128:dynamic", "nf4:64:dynamic"):
        with pytest.raises(
            ValueError, match="dynamic: inputs are rounded for int8, and for fp8 with one scale an output"
        ):
            stored(text)
