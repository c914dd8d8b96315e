"""Formats of few bits: how far a number may move, what is kept exactly, how small they are, and products with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config
from jaxlm.core.compression import Format
from jaxlm.core.spec import Spec, zeros
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import make_mesh
from jaxlm.weights.compress import formats
from jaxlm.weights.few_bits import FP4, Scaled, in_pairs, unpaired

FORMATS = {
    "int8": Format("int8"),
    "int4 g32": Format("int4", 32),
    "int4 g128": Format("int4"),
    "int4 zero": Format("int4", 64, zero_point=True),
    "fp8": Format("fp8"),
    "fp8 blocks": Format("fp8", 128),
    "mxfp4": Format("mxfp4"),
}
SHAPES = [(1, 1), (7, 3), (33, 5), (130, 131)]  # one number; less than a group; odd ones across groups and blocks


@functools.cache
def compiled(name: str):
    f = FORMATS[name]

    @functools.partial(jax.jit, static_argnums=1)
    def run(w, shape):
        leaf = formats.nearest(f, w, shape[:1], shape[1:])
        return leaf, leaf.dense()

    return run


def group_of(w: np.ndarray, f: Format, measure) -> np.ndarray:
    """Returns a measure of each number's group, block or output, of the shape of `w`, one number after another."""
    out, n = np.empty_like(w), f.inputs or len(w)
    for i in range(0, len(w), n):
        for j in range(0, w.shape[1], 128 if f == FORMATS["fp8 blocks"] else 1):
            where = np.s_[i : i + n, j : j + (128 if f == FORMATS["fp8 blocks"] else 1)]
            out[where] = measure(w[where])
    return out


def bound(w: np.ndarray, f: Format) -> np.ndarray:
    """Returns how far each number may move at most, in float64."""
    largest = group_of(w, f, lambda g: abs(g).max())
    if f.kind == "int8":
        error = largest / 127 / 2
    elif f.kind == "int4" and not f.zero_point:
        error = largest / 7 / 2 * (1 + 2**-8)  # the scale is rounded to eight bits
    elif f.kind == "int4":
        step = group_of(w, f, lambda g: max(g.max(), 0) - min(g.min(), 0)) / 15
        error = step * (0.5 + 16 * 2**-8)  # the rounded scale falls short at the end of the range, of 15 steps
    elif f.kind == "fp8":
        error = np.maximum(abs(w) * 2**-4, largest / 448 * 2**-10)  # 3 bits of mantissa; 2⁻⁹ is the least number
    else:
        # The least squared error of the group's two powers of two bounds each number's error by that of all together;
        # with the larger one every number is in range, and the gaps are 2 (beyond 4), 1 and ½ of the power.
        power = 2.0 ** np.floor(np.log2(np.maximum(largest, 1e-30)) - 1)
        gap = np.where(abs(w) > 4 * power, 2, np.where(abs(w) > 2 * power, 1, 0.5)) * power
        error = np.sqrt(group_of((gap / 2) ** 2, f, np.sum))
    return error * (1 + 1e-5) + 1e-30


def matrix(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    w = np.random.default_rng(seed).standard_normal(shape)
    if kind == "outliers":
        w[seed % shape[0], seed % shape[1]] = 1000
    if kind == "zero rows":
        w[seed % shape[0]] = 0
        w[:, seed % shape[1]] = 0
    if kind == "tiny":
        w *= 1e-20
    if kind == "one-sided":
        w = abs(w) + 3
    if kind == "wide":
        w *= 10.0 ** np.random.default_rng(seed).integers(-6, 6, shape)
    return w.astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_no_number_moves_further_than_its_bound(name):
    for shape in SHAPES:
        for kind in ("normal", "outliers", "zero rows", "tiny", "one-sided", "wide"):
            for seed in range(6):
                w = matrix(kind, shape, seed)
                leaf, found = compiled(name)(w, shape)
                moved = abs(np.asarray(found, np.float64) - w)
                limit = bound(w.astype(np.float64), FORMATS[name])
                assert (moved <= limit).all(), (kind, shape, seed, (moved - limit).max())
                assert (np.asarray(found)[w == 0] == 0).all(), "zeros stay zeros"
    assert jax.tree.leaves(leaf)[0].dtype != jnp.float32


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_format_has_is_kept_exactly(name):
    f, shape = FORMATS[name], (130, 131)
    steps = {"int8": np.arange(-127, 128), "fp8": np.arange(-448, 449, 32), "mxfp4": np.array([*FP4, -6, -1.5])}
    numbers = steps.get(f.kind, np.arange(-7, 8) if not f.zero_point else np.arange(-5, 11)) / 4
    w = np.random.default_rng(0).choice(numbers, shape)
    w[::32], w[1::32] = numbers.max(), numbers.min()  # every group has the ends of the range
    w = w.astype(np.float32)
    np.testing.assert_array_equal(compiled(name)(w, shape)[1], w)


def test_the_nearest_number_of_mxfp4_is_found_by_brute_force():
    w = matrix("normal", (32, 4), 0)
    levels = np.array([*FP4, *(-x for x in FP4)])
    candidates = []
    for e in range(-6, 3):
        near = levels[abs(w[..., None] / 2.0**e - levels).argmin(-1)] * 2.0**e
        candidates.append(np.square(near - w).sum(0))
    _, found = compiled("mxfp4")(w, (32, 4))
    np.testing.assert_allclose(np.square(np.asarray(found) - w).sum(0), np.min(candidates, 0), rtol=1e-5)


def test_bytes_are_counted():
    wanted = {  # 256 × 512 numbers
        "int8": 256 * 512 + 4 * 512,
        "int4 g32": 128 * 512 + 2 * 8 * 512,
        "int4 g128": 128 * 512 + 2 * 2 * 512,
        "int4 zero": 128 * 512 + 3 * 4 * 512,
        "fp8": 256 * 512 + 4 * 512,
        "fp8 blocks": 256 * 512 + 4 * 2 * 4,
        "mxfp4": 128 * 512 + 8 * 512,
    }
    assert {name: formats.nbytes(f, 256, 512) for name, f in FORMATS.items()} == wanted
    assert compiled("int4 g32")(matrix("normal", (33, 5), 0), (33, 5))[0].nbytes == 17 * 5 + 2 * 2 * 5


def test_pairs_of_codes_come_back():
    for n in (1, 2, 7):
        codes = np.random.default_rng(n).integers(0, 16, (2, n, 3), np.uint8)
        np.testing.assert_array_equal(unpaired(in_pairs(jnp.asarray(codes)), n), codes)
    assert int(in_pairs(jnp.array([[1], [2]], jnp.uint8))[0, 0]) == 0x12, "the first is the high half"


def leaf_of(name: str, w: jax.Array):
    """A weight `[L, H, C, D]` whose inputs are H and C."""
    return jax.vmap(lambda w: formats.nearest(FORMATS[name], w.reshape(-1, w.shape[-1]), w.shape[:2], w.shape[2:]))(w)


@pytest.mark.parametrize(
    "name",
    [
        "int4 zero",
        "fp8",
        "scaled",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "fp8 blocks", "mxfp4")),
    ],
)
def test_products_and_their_gradients_are_those_of_the_dense_weight(one_device, name):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 24, 6)), jnp.float32)
    leaf = leaf_of("int4 g32" if name == "scaled" else name, w)
    if name == "scaled":
        leaf = Scaled(base=leaf, by=jnp.abs(w[..., 0]) + 0.5, outs=1)
    assert leaf.ndim == 4 and leaf.dense().shape == w.shape
    layer = jax.tree.map(lambda x: x[1], leaf)
    np.testing.assert_allclose(layer.dense(), leaf.dense()[1], rtol=1e-6)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4, 24)), jnp.float32)
    shard = Layout(execution=config.Execution(dtype="float32"))

    def f(x, w):
        return jnp.sin(shard.einsum("bthc,hcd->btd", x, w, "batch", "seq", None)).sum()

    got, wanted = (jax.jit(jax.value_and_grad(f))(x, v) for v in (layer, layer.dense()))
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], wanted[1], atol=2e-4)


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_gathered_on_a_mesh_it_multiplies_as_on_one_device(axis_type):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 24, 6)), jnp.float32)
    leaf = jax.tree.map(lambda x: x[0], leaf_of("int4 zero", w))
    s = Spec((1, 4, 24, 6), ("layers", "heads", None, "embed"), zeros)
    shard = Layout(execution=config.Execution(dtype="float32"))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4, 24)), jnp.float32)

    def f(x, w):
        w = shard.gather(w, s)
        return shard.einsum("bthc,hcd->btd", shard(x, "batch", "seq", "heads", None), w, "batch", "seq", None)

    with jax.set_mesh(make_mesh(config.Mesh(data=1, fsdp=2, tensor=4, axis_type=axis_type))):
        found = jax.jit(f)(x, leaf)
    np.testing.assert_allclose(found, jnp.einsum("bthc,hcd->btd", x, leaf.dense()), atol=1e-4)


def test_formats_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="group: int4 has no groups of 48 inputs; it takes 128 or 64 or 32"):
        _ = Format("int4", 48).inputs
    with pytest.raises(ValueError, match="zero_point: fp8 has none"):
        _ = Format("fp8", zero_point=True).inputs
    with pytest.raises(ValueError, match="format: nf4 is rounded to the nearest alone"):
        formats.rounding(Format("nf4"))


def test_nf4_is_the_leaf_that_adapters_stand_on():
    w = jnp.asarray(matrix("normal", (128, 6), 0))
    leaf = formats.nearest(Format("nf4"), w, (2, 64), (6,))
    assert leaf.dense().shape == (2, 64, 6)
    assert float(jnp.sqrt(jnp.mean(jnp.square(leaf.dense().reshape(128, 6) - w)))) < 0.11
