"""Products of a few rows with matrices of int8 and int4, read as they are stored, against the plain product."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config
from jaxlm.core.compression import Format
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.nn.kernels import few_bit_matmul
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import make_mesh
from jaxlm.weights import few_bits, matrices, quantized
from jaxlm.weights.compress import formats

CHOICE = few_bit_matmul.choose()
needs_code = pytest.mark.skipif(CHOICE.method != "kernel", reason=f"products of few bits are {CHOICE.description}")
DENSE = few_bit_matmul.FewBitMatmulChoice("dense", "as asked for by a test")
SHAPES = [(1, 1), (2, 17), (7, 5), (33, 63), (129, 64), (192, 200), (576, 1537), (1535, 576)]  # inputs, outputs


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_near(got, expected, x, w):
    """Holds a product to float32's rounding of its terms."""
    terms = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
    assert np.all(np.abs(np.asarray(got, np.float64) - expected) <= 3e-6 * terms + 1e-30)


@needs_code
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_int8_is_the_plain_product_for_every_number_of_rows(inputs, outputs):
    r = np.random.default_rng(inputs)
    codes = r.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    scale = r.uniform(0.01, 2, outputs).astype(np.float32)
    w = codes * scale.astype(np.float64)
    for rows in range(1, few_bit_matmul.MOST_ROWS + 1):
        x = drawn(rows, inputs, seed=rows)
        assert_near(jax.jit(few_bit_matmul.int8)(x, codes, scale), x.astype(np.float64) @ w, x, w)


@needs_code
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_int4_is_the_plain_product_for_every_number_of_rows(inputs, outputs, group, zeros):
    r = np.random.default_rng(inputs + group)
    codes = r.integers(0, 16, (inputs, outputs)).astype(np.uint8)
    groups = -(-inputs // group)  # the last one is short
    scale = jnp.asarray(r.uniform(0.01, 2, (groups, outputs)), jnp.bfloat16)
    zero = r.integers(0, 16, (groups, outputs)).astype(np.uint8) if zeros else None

    def of_inputs(x):
        return np.repeat(np.asarray(x, np.float64), group, 0)[:inputs]

    middle = of_inputs(zero) if zeros else 8
    w, largest = of_inputs(scale) * (codes.astype(np.float64) - middle), of_inputs(scale) * 15
    packed = few_bits.in_pairs(jnp.asarray(codes))
    if inputs % 2:
        packed = packed.at[-1].add(9)  # what pads the last byte says nothing
    f = jax.jit(lambda x: few_bit_matmul.int4(x, packed, scale, zero, group))
    for rows in (1, 3, 8):
        x = drawn(rows, inputs, seed=rows)
        assert_near(f(x), x.astype(np.float64) @ w, x, largest)


def leaves() -> dict:
    w = jnp.asarray(drawn(96, 4, 24))
    out = {"int8": quantized.Int8(**quantized.int8(w, 1, 2), outs=2)}
    for form in (Format("int4", 32), Format("int4", 128, zero_point=True)):
        out[f"int4 {form.group}"] = formats.nearest(form, w.reshape(96, 96), (96,), (4, 24))
    return out


def product(x, w):
    return w.einsum("btd,dhc->bthc", x, Layout(), "batch", "seq", "heads", None)


def by_code(f, *arguments) -> bool:
    return "ffi_call" in str(jax.make_jaxpr(f)(*arguments))


@needs_code
@pytest.mark.parametrize("name", list(leaves()))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_leaf_multiplies_a_few_rows_by_code_with_the_same_gradients(name, dtype, monkeypatch):
    w, x = leaves()[name], jnp.asarray(drawn(2, 3, 96), dtype)

    def both(x):
        y, pull = jax.vjp(lambda x: product(x, w), x)
        return y, pull(jnp.ones_like(y))[0]

    assert by_code(lambda x: product(x, w), x)
    found = jax.jit(both)(x)
    monkeypatch.setattr(few_bit_matmul, "choose", lambda: DENSE)
    assert not by_code(lambda x: product(x, w), x)
    expected = jax.jit(lambda x: both(x))(x)
    assert found[0].dtype == expected[0].dtype == x.dtype
    near = dict(rtol=1e-5, atol=1e-4) if dtype == "float32" else dict(rtol=0.03, atol=0.3)
    np.testing.assert_allclose(*(np.asarray(y[0], np.float32) for y in (found, expected)), **near)
    np.testing.assert_allclose(*(np.asarray(y[1], np.float32) for y in (found, expected)), rtol=1e-6)


@needs_code
def test_what_the_code_is_not_for_is_multiplied_as_ever():
    w, x = leaves()["int4 32"], jnp.asarray(drawn(1, 1, 96))
    assert by_code(product, x, w)
    assert not by_code(product, jnp.asarray(drawn(3, 3, 96)), w), "9 rows"
    assert not by_code(product, x, w.replace(scale=w.scale.astype(jnp.float32))), "other scales"
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8)).astype(np.uint8))
    odd = few_bits.Int4(int4=codes, scale=jnp.ones((2, 8), jnp.bfloat16), group=3, in_shape=(6,), out_shape=(8,))
    x6 = jnp.asarray(drawn(1, 6))
    assert not by_code(lambda x: odd.einsum("bd,dc->bc", x, Layout(), None, None), x6), "a byte of two groups"
    dynamic = quantized.Int8(**quantized.int8(jnp.asarray(drawn(96, 4, 24)), 1, 2), outs=2, dynamic=True)
    assert not by_code(product, x, dynamic)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:2])):
        assert not by_code(product, x, w)


@needs_code
def test_many_threads_multiply_at_once():
    codes = np.random.default_rng(0).integers(-127, 128, (576, 1536)).astype(np.int8)
    f = jax.jit(few_bit_matmul.int8)
    scale = np.ones(1536, np.float32)
    inputs = [drawn(1 + i % 8, 576, seed=i) for i in range(64)]
    for rows in range(1, 9):  # compiled before, so that the calls come together
        f(inputs[rows - 1], codes, scale).block_until_ready()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: np.asarray(f(x, codes, scale)), inputs * 4))
    for x, y in zip(inputs * 4, found, strict=True):
        assert_near(y, x.astype(np.float64) @ codes, x, codes)


@needs_code
def test_many_products_of_one_program_may_run_at_once():
    codes = [np.random.default_rng(i).integers(-127, 128, (96, 700)).astype(np.int8) for i in range(12)]
    x, scale = drawn(1, 96), np.ones(700, np.float32)
    f = jax.jit(lambda x: [few_bit_matmul.int8(x, w, scale) for w in codes])
    for _ in range(50):
        for w, y in zip(codes, f(x), strict=True):
            assert_near(y, x.astype(np.float64) @ w, x, w)


@needs_code
def test_operands_of_other_shapes_are_refused():
    def call(x, codes, scale):
        result = jax.ShapeDtypeStruct((x.shape[0], codes.shape[1]), jnp.float32)
        name = few_bit_matmul._target("int8")
        return jax.ffi.ffi_call(name, result)(x, codes, scale, group=np.int64(0))

    x, codes, scale = drawn(1, 4), np.zeros((4, 3), np.int8), np.ones(3, np.float32)
    call(x, codes, scale)
    for other in ((x, codes, scale[:2]), (x[:, :3], codes, scale), (x, codes.astype(np.uint8), scale),
                  (drawn(9, 4), codes, scale), (x, codes, scale[None])):  # fmt: skip
        with pytest.raises(Exception, match="operands aren't those"):
            jax.block_until_ready(call(*other))


@needs_code
@pytest.mark.parametrize("form", [Format("int8"), Format("int4", 32)])
def test_texts_are_the_same_with_and_without_the_code(form, monkeypatch):
    from jaxlm.core import spec, tree
    from jaxlm.core.compression import Nearest
    from jaxlm.models import llama
    from jaxlm.models.model import Model
    from jaxlm.weights.compress.solve import solve

    c = llama.Config(vocab=211, layers=2, width=64, heads=4, kv_heads=2, ffn=96)
    specs = llama.specs(c)
    r = np.random.default_rng(0)
    params = jax.tree.map(lambda s: r.standard_normal(s.shape).astype(np.float32) / 3, specs, is_leaf=spec.is_spec)
    for path, m in matrices.select(matrices.matrices(llama, c), ("all",)).items():
        params = tree.put(params, path, solve(Nearest(form), tree.at(params, path), ins=m.ins, outs=m.outs).weight)
    model = Model(llama, c, specs, Layout(execution=config.Execution(dtype="float32")))
    calls = []
    told = few_bit_matmul._call
    monkeypatch.setattr(few_bit_matmul, "_call", lambda *a: calls.append(a[0]) or told(*a))

    def written() -> list[list[int]]:
        generator = Generator(model)
        answers = generator(generator.prepare(params), [[1, 2, 3], [9]], Sampling(tokens=24))
        return [a.tokens for each in answers for a in each]

    found = written()
    assert set(calls) == {form.kind} and len(calls) >= 14, "every matrix of both layers"
    calls.clear()
    monkeypatch.setattr(few_bit_matmul, "choose", lambda: DENSE)
    assert written() == found and not calls
    assert len({*found[0], *found[1]}) > 4, "texts that say something"


def test_the_choice_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(few_bit_matmul.importlib.metadata, "version", lambda name: "0.44.0")
    few_bit_matmul._unavailable.cache_clear()
    try:
        found = few_bit_matmul.choose()
        assert found.method == "dense" and "llvmlite 0.44.0 is older than 0.50" in found.description
        assert found.remedy == 'pip install "jaxlm[cpu]"'
        few_bit_matmul._unavailable.cache_clear()
        monkeypatch.setattr(few_bit_matmul.importlib.metadata, "version", lambda name: "0.50.0")
        monkeypatch.setattr(few_bit_matmul, "interface_version", lambda: (1, 0))
        found = few_bit_matmul.choose()
        assert found.method == "dense" and "another interface" in found.description and not found.remedy
    finally:
        few_bit_matmul._unavailable.cache_clear()
