"""What only a GPU can show: its fused attention is attention, whatever the mask, its products of fp8 are products, and
a step in bfloat16 learns.

JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/nn/test_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import attention, fp8, int8, losses, matmul
from jaxlm.nn.kernels import packed_attention
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU, and jax runs on the CPU here"),
]


@pytest.fixture(autouse=True)
def as_in_training():
    """The kernels and precisions that training gets, not those of conftest.py's quick and strict tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", True)


def layout(which: str, **more) -> Layout:
    return Layout(execution=config.Execution(attention=which, **more))


def distance(x, y) -> float:
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


MASKS = {
    "causal": (True, None, False),
    "all": (False, None, False),
    "causal window": (True, 70, False),
    "causal documents": (True, None, True),
    "documents": (False, None, True),
    "causal window documents": (True, 70, True),
}


# rows of 256 positions, grouped queries; rows that no tile divides, each head with its own keys; other widths
SHAPES = [
    *((name, 256, 8, 2, 128) for name in MASKS),
    *((name, 200, 4, 4, 64) for name in ("causal", "causal documents")),
    *(("causal documents", 512, 4, 1, C) for C in (96, 192, 256)),
]
CASES = [(*shape, documents) for shape in SHAPES for documents in ((0, 1, 40) if "documents" in shape[0] else (0,))]


@pytest.mark.parametrize(("name", "T", "H", "K", "C", "packed"), CASES)
def test_fused_attention_and_its_gradients_equal_plain_attention_in_float32(name, T, H, K, C, packed):
    """`packed`: documents a row that are told by where they begin, few for one call or too many; 0: by a mask."""
    causal, window, documents = MASKS[name]
    rng = np.random.default_rng(T)
    segments = None
    if documents:  # then padding
        segments = np.sort(rng.integers(1, 1 + (packed or 3), (2, T)), -1).astype(np.int32)
        segments[:, -T // 10 :] = 0
    mask = Mask(causal, window, segments, segments, packed=bool(packed))
    choice = attention.choose("auto", mask, False, None, "bfloat16", widths=(C, C), lengths=(T, T))
    assert choice.implementation == "cudnn"
    if packed and not choice.dense:
        room = 2 * packed_attention.room(T)
        assert (int(packed_attention.number_documents(jnp.asarray(segments))[-1, -1]) >= room) == (packed == 40)
    x = [jnp.asarray(rng.standard_normal((2, T, n, C)), jnp.bfloat16) for n in (H, K, K, H)]

    def both(x, which):
        shard = layout(which, dtype=str(x[0].dtype))
        out, back = jax.vjp(lambda q, k, v: attention.attend(q, k, v, mask, shard=shard), *x[:3])
        return out, *back(x[3])

    @jax.jit
    def run(x):
        with jax.default_matmul_precision("highest"):
            plain = both([a.astype(jnp.float32) for a in x], "xla")
        return both(x, "cudnn"), plain

    fused, plain = run(x)
    for what, a, b in zip(("values", "d q", "d k", "d v"), fused, plain, strict=True):
        assert distance(a, b) < 0.02, what


def test_a_product_in_fp8_is_one_call_of_cublaslt_and_equals_that_of_the_rounded_numbers():
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((512, 256), (256, 384), (512, 384)))

    def both(x, w, g):
        matrix = matmul.NarrowMatrix(w, matmul.Activations(fp8.WAY))
        y, back = jax.vjp(lambda x, w: Layout().einsum("td,df->tf", x, matrix.replace(w=w), None, None), x, w)
        return y, *back(g)

    compiled = jax.jit(both).lower(x, w, g).compile(compiler_options=dict(fp8.OPTIONS))
    assert compiled.as_text().count('custom_call_target="__cublas$lt$matmul$f8"') == 3
    made = [fp8.scaled(a, kind) for a, kind in ((x, fp8.E4M3), (w, fp8.E4M3), (g, fp8.E5M2))]
    x8, w8, g8 = (np.asarray(a.numbers, np.float64) * float(a.unit) for a in made)
    for got, exact in zip(compiled(x, w, g), (x8 @ w8, g8 @ w8.T, x8.T @ g8), strict=True):
        assert distance(got, exact) < 0.003  # cuBLASLt's sums of fp8 have fewer digits than float32's


def test_a_product_in_int8_is_exactly_that_of_the_codes():
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((512, 256), (256, 384), (512, 384)))

    def both(x, w, g):
        matrix = matmul.NarrowMatrix(w, matmul.Activations(int8.WAY))
        y, back = jax.vjp(lambda x, w: Layout().einsum("td,df->tf", x, matrix.replace(w=w), None, None), x, w)
        return y, *back(g)

    y, dx, dw = jax.jit(both)(x, w, g)
    for got, a, b in ((y, int8.coded(x, (1,)), int8.coded(w, (0,))), (dx, int8.coded(g, (1,)), int8.coded(w.T, (0,)))):
        a_codes, b_codes, a_scale, b_scale = (np.asarray(v, np.float64) for v in (a.codes, b.codes, a.scale, b.scale))
        exact = a_codes @ b_codes * a_scale * b_scale
        assert np.abs(np.asarray(got, np.float64) - exact).max() <= 2.0**-8 * np.abs(exact).max()
    assert distance(dw, np.asarray(x, np.float64).T @ np.asarray(g, np.float64)) < 0.003


@pytest.mark.parametrize(("family", "scan"), [("gpt2", True), ("llama", False)])
def test_a_model_in_bfloat16_learns_a_packed_batch(family, scan):
    """Loss and gradients near float32's, all finite, and gradient descent brings the loss down."""
    module, T = MODELS[family], 128
    more = dict(positions=T) if family == "gpt2" else dict(kv_heads=2, head_width=64, ffn=512)
    c = module.Config(**dict(vocab=512, layers=2, width=256, heads=4) | more)
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (4, T)), -1).astype(np.int32)
    batch = dict(tokens=rng.integers(0, 512, (4, T)).astype(np.int32), segments=segments)
    batch["positions"] = np.arange(T, dtype=np.int32)[None] - np.stack(
        [np.searchsorted(row, row) for row in segments]
    ).astype(np.int32)
    targets, counted = np.roll(batch["tokens"], -1, 1), np.ones((4, T), np.float32)

    def grade(weights, shard):
        model = Model(module, c, module.specs(c), shard)

        def loss(weights):
            readout = model.readout(weights, model.forward(weights, batch).x_BTD)
            return losses.cross_entropy(readout, targets, counted, shard=shard).loss / targets.size

        return jax.value_and_grad(loss)(weights)

    weights = spec.init(module.specs(c), jax.random.key(0))
    quick = jax.jit(lambda w: grade(w, layout("cudnn", scan=scan)))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda w: grade(w, layout("xla", scan=scan, dtype="float32")))(weights)
    first, gradients = quick(weights)
    assert abs(first - exact[0]) < 0.01
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (gradients, exact[1])]
    assert distance(*flat) < 0.03
    for _ in range(5):
        weights = jax.tree.map(lambda w, g: w - 0.5 * g, weights, gradients)
        last, gradients = quick(weights)
    assert np.isfinite(last) and last < first - 0.05
