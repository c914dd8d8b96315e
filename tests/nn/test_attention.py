"""One answer for every mask, however it is computed; a request that can't be met is an error, never a quiet change."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config
from jaxlm.models import llama
from jaxlm.nn import attention
from jaxlm.nn.attention import KEEP_SCORES, AttentionChoice, attend, choose
from jaxlm.nn.kernels import splash_attention
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask
from jaxlm.runtime.mesh import make_mesh
from jaxlm.weights import adapters
from jaxlm.weights.adapters.adapted import Adapted

LAYOUT = Layout(execution=config.Execution(dtype="float32"))


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def inputs(T: int, H: int = 4, K: int = 2, C: int = 4, B: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(T)
    return tuple(rng.standard_normal((B, T, n, C)).astype(np.float32) for n in (H, K, K))


def segments(T: int, B: int = 2) -> np.ndarray:
    """Three documents in each row, then padding."""
    rng = np.random.default_rng(1)
    out = np.sort(rng.integers(1, 4, (B, T)), -1).astype(np.int32)
    out[:, -max(1, T // 10) :] = 0
    return out


def dense(mask: Mask, T: int) -> np.ndarray:
    """Written out from the definition, one pair at a time."""
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    seen = np.ones((1, T, T), bool)
    if mask.causal:
        seen &= (t >= s)[None]
    if mask.window is not None:
        seen &= (abs(t - s) < mask.window)[None]
    if mask.segments_BT is not None:
        seen = seen & (mask.segments_BT[:, :, None] == mask.segments_BT[:, None])
    return seen


MASKS = {
    "causal": (True, None, False),
    "all": (False, None, False),
    "causal window": (True, 20, False),
    "window": (False, 20, False),
    "causal documents": (True, None, True),
    "documents": (False, None, True),
    "causal window documents": (True, 20, True),
}


@jax.jit
def reference(q, k, v, seen, pull):
    """JAX's values and gradients, by a program that every mask of a length shares."""
    f = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=seen, implementation="xla")  # noqa: E731
    out, back = jax.vjp(f, q, k, v)
    return out, back(pull)


# The masks of several blocks; of a single one, which cuts nothing from a mask, the fullest and the emptiest.
SHORT = [(24, "all"), (24, "causal window documents")]
EVERY = [(T, name) for T in (24, KEEP_SCORES + 77) for name in MASKS]


@pytest.mark.parametrize(
    ("T", "name"),
    [
        *SHORT,
        *((300, name) for name in MASKS),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in SHORT),
    ],
)
def test_values_and_gradients_equal_jax_nn(name, T):
    """24 is one block of queries, 300 is three blocks of which the last is ragged; beyond 512 scores are recomputed."""
    causal, window, documents = MASKS[name]
    seg = segments(T) if documents else None
    mask = Mask(causal, window, seg, seg)
    q, k, v = inputs(T)
    pull = np.random.default_rng(2).standard_normal(q.shape).astype(np.float32)
    seen = np.broadcast_to(dense(mask, T)[:, None], (len(q), 1, T, T))

    @jax.jit
    def ours(q, k, v):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, shard=LAYOUT), q, k, v)
        return out, back(jnp.asarray(pull))

    got, expected = ours(q, k, v), reference(q, k, v, seen, pull)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), got, expected)


def test_beyond_the_limit_scores_are_computed_again():
    """The backward pass of a long sequence may not hold the scores of all blocks."""
    T, mask = KEEP_SCORES + 1, Mask(True)

    def kept(T: int) -> int:
        back = jax.eval_shape(lambda *x: jax.vjp(lambda *x: attend(*x, mask, shard=LAYOUT), *x)[1], *inputs(T, B=1))
        return max(x.size for x in jax.tree.leaves(back) if jnp.issubdtype(x.dtype, jnp.floating))

    assert kept(T) <= T * 16
    assert kept(256) >= 256 * 128  # so the measure does see scores


@pytest.mark.parametrize(
    ("T", "mask"), [(128, Mask(True)), (640, Mask(True)), (640, Mask(True, 50)), (5000, Mask(False, 300))]
)
def test_blocks_cover_every_query_once_and_reach_every_key_that_may_be_seen(T, mask):
    blocks = attention.query_blocks(T, T, mask)
    assert [b[0] for b in blocks] == [0, *(b[1] for b in blocks[:-1])] and blocks[-1][1] == T
    assert len(blocks) <= attention.MOST_BLOCKS
    for start, stop, first, last in blocks:
        lowest = 0 if mask.window is None else max(0, start - mask.window + 1)
        highest = stop if mask.causal else T if mask.window is None else min(T, stop + mask.window - 1)
        assert first <= lowest and highest <= last
    if mask.causal and T > 128:
        assert sum((b - a) * (d - c) for a, b, c, d in blocks) < 0.7 * T * T, "nothing was skipped"


@pytest.mark.parametrize("T", [16, 200])
def test_bias_scale_and_soft_cap(T):
    q, k, v = inputs(T, K=4)
    bias = np.random.default_rng(3).standard_normal((4, T, T)).astype(np.float32)
    seg = segments(T)
    how = dict(shard=LAYOUT, scale=0.3, softcap=2.0)
    out = jax.jit(lambda *x: attend(*x, Mask(True, None, seg, seg), bias_BHTS=bias[None], **how))(q, k, v)
    s = 2 * np.tanh(0.3 * np.einsum("bthc,bshc->bhts", q, k) / 2) + bias[None]
    s = np.where(dense(Mask(True, None, seg, seg), T)[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshc->bthc", p / p.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-4)


def test_each_group_of_heads_reads_its_own_keys():
    q, k, v = inputs(16, H=4, K=2)
    wide = [np.repeat(x, 2, axis=2) for x in (k, v)]
    run = jax.jit(lambda *x: attend(*x, Mask(True), shard=LAYOUT))
    grouped, full = run(q, k, v), run(q, *wide)
    np.testing.assert_allclose(grouped, full, atol=1e-6)


def test_scores_and_softmax_are_formed_in_float32():
    """Scores near 40 would be rounded to quarters in bfloat16, and a sum of 600 equal shares would stop at 256."""
    rng, shape = np.random.default_rng(0), (32, 8, 1, 4)
    q = np.full(shape, 4.5, jnp.bfloat16)
    k, v = (x.astype(jnp.bfloat16) for x in (4.5 + rng.standard_normal(shape) / 8, rng.standard_normal(shape)))
    run = jax.jit(lambda *x: attend(*x, Mask(False), shard=LAYOUT))
    out = np.asarray(run(q, k, v))
    assert out.dtype == jnp.bfloat16
    exact = run(*(x.astype(np.float32) for x in (q, k, v)))
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.015)
    same, ones = (np.full((1, 600, 1, 4), n, jnp.bfloat16) for n in (0, 1))
    np.testing.assert_allclose(np.asarray(run(same, same, ones)).astype(np.float32), 1.0, atol=0.01)


@pytest.mark.parametrize("width", [64, 80, 96, 128])
def test_queries_are_not_rounded_by_scaling_them(width):
    """At most widths 1/√C is no number of bfloat16; the scores of bfloat16's queries and keys are those of float32."""
    rng = np.random.default_rng(width)
    q, k = (jnp.asarray(2 * rng.standard_normal((1, 64, 1, width)), jnp.bfloat16) for _ in range(2))
    v = jnp.eye(64, dtype=jnp.bfloat16)[None, :, None]  # the result is the shares themselves
    out = attend(q, k, v, Mask(False), shard=LAYOUT).astype(jnp.float32)
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), Mask(False), shard=LAYOUT)
    error = np.abs(out - exact)[exact > 1e-3] / exact[exact > 1e-3]
    assert error.max() < 0.005, "more than the rounding of the shares themselves"


def test_queries_and_keys_of_different_lengths():
    q, _, _ = inputs(5)
    _, k, v = inputs(9)
    out = jax.jit(lambda *x: attend(*x, Mask(False), shard=LAYOUT))(q, k, v)
    np.testing.assert_allclose(out, jax.jit(jax.nn.dot_product_attention)(q, k, v), atol=1e-5)


# --------------------------------------------------------------------------------------------------- which one and why


def test_an_implementation_that_cannot_run_here_is_an_error_with_its_remedy():
    with pytest.raises(
        ValueError, match=r"execution\.attention: cudnn needs an NVIDIA GPU, and .* on cpu; use auto or xla"
    ):
        choose("cudnn", Mask(True), False, None, "bfloat16")
    q, k, v = inputs(8)
    asked = Layout(execution=config.Execution(attention="cudnn"))
    with pytest.raises(ValueError, match=r"execution\.attention"):
        attend(q, k, v, Mask(True), shard=asked)


def test_auto_says_what_and_why():
    choice = choose("auto", Mask(True), False, None, "bfloat16")
    assert choice == AttentionChoice("xla", "cudnn needs an NVIDIA GPU, and this program runs on cpu")
    assert choice.describe() == "xla (cudnn needs an NVIDIA GPU, and this program runs on cpu)"
    named = choose("xla", Mask(True), False, None, "float32")
    assert named == AttentionChoice("xla", "asked for by execution.attention")


@pytest.mark.parametrize(
    ("softcap", "dtype", "message"),
    [
        (None, "float32", r"cudnn computes in bfloat16, not float32; set execution\.dtype=bfloat16"),
        (30.0, "bfloat16", "cudnn has no soft cap"),
    ],
)
def test_what_cudnn_cannot_do_on_a_gpu(monkeypatch, softcap, dtype, message):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=message):
        choose("cudnn", Mask(True), False, softcap, dtype)
    choice = choose("auto", Mask(True), False, softcap, dtype)
    assert choice.implementation == "xla" and "cudnn" in choice.reason
    assert choose("auto", Mask(True), False, None, "bfloat16").implementation == "cudnn"


def test_a_kernel_that_takes_whole_rows_gets_them_by_heads_alone(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose("auto", Mask(True), False, None, "bfloat16", split="heads").implementation == "cudnn"
    for by in ("gather", "ring"):
        assert choose("auto", Mask(True), False, None, "bfloat16", split=by).implementation == "xla"
        with pytest.raises(ValueError, match=rf"cudnn takes whole rows, which mesh\.context_by={by} does not give it"):
            choose("cudnn", Mask(True), False, None, "bfloat16", split=by)


# ------------------------------------------------------------------------------------------ the fused kernel of TPUs


@pytest.fixture
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(splash_attention, "INTERPRET", True)


@pytest.mark.parametrize(
    ("name", "sizes", "softcap", "sinks"),
    [
        ("causal documents", {}, None, False),
        ("all", {"fsdp": 2, "tensor": 2}, 5.0, False),
        ("causal window documents", {"tensor": 2, "axis_type": "explicit"}, None, True),
    ],
)
def test_splash_equals_plain_attention(on_a_tpu, name, sizes, softcap, sinks):
    causal, window, documents = MASKS[name]
    T = 384  # three blocks, of which masks let some be skipped
    seg = segments(T, 4) if documents else None
    mask, x = Mask(causal, window, seg, seg), inputs(T, C=128, B=4)
    pull = np.random.default_rng(2).standard_normal(x[0].shape).astype(np.float32)
    given = (*x, np.linspace(-1, 1, 4, dtype=np.float32)) if sinks else x
    mesh = make_mesh(config.Mesh(**sizes)) if sizes else None

    def run(which: str):
        layout = Layout(execution=config.Execution(dtype="float32", attention=which))

        def both(*given):
            def f(q, k, v, *sinks_H):
                q = layout(q, "batch", "seq", "heads", None)  # as a layer hands it over
                more = dict(sinks_H=sinks_H[0]) if sinks else {}
                return attend(q, k, v, mask, shard=layout, softcap=softcap, **more)

            out, back = jax.vjp(f, *given)
            return out, back(layout(jnp.asarray(pull), "batch", "seq", "heads", None))

        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            return jax.jit(both)(*given)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), run("splash"), run("xla"))


@pytest.mark.parametrize(
    ("mask", "request_", "message"),
    [
        (Mask(True), dict(bias=True), "splash has no bias on scores"),
        (Mask(True, prefix_BS=np.ones((1, 128), bool)), {}, "splash has no keys that all queries see"),
        (Mask(True), dict(lengths=(128, 200)), "splash takes rows of multiples of 128 positions, not 200"),
        (Mask(True), dict(widths=(192, 128)), "splash has one width for keys and values, not 192 and 128"),
    ],
)
def test_what_splash_cannot_do(monkeypatch, mask, request_, message):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose("auto", Mask(True), False, 30.0, "float32", True) == AttentionChoice(
        "splash", "fused kernel of this TPU"
    )
    plain = dict(bias=False, softcap=None, dtype="bfloat16") | request_
    assert choose("auto", mask, **plain) == AttentionChoice("xla", message)
    with pytest.raises(ValueError, match=f"execution.attention: {message}; use auto or xla"):
        choose("splash", mask, **plain)


def test_virtual_tokens_that_every_segment_sees_are_not_for_splash(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    c = llama.Config(vocab=8, layers=1, width=8, heads=1, kv_heads=1, head_width=8, ffn=8)
    for method, then in (("prompt", "xla"), ("lora", "auto")):
        adapted = Adapted(adapters.METHODS[method].Config(), llama, c)
        assert adapted.layout(LAYOUT).execution.attention == then
        assert adapted.layout(LAYOUT).shared_keys == (method == "prompt")
    asked = Layout(execution=config.Execution(attention="splash"))
    with pytest.raises(ValueError, match=r"splash has no keys that all queries see \(`adapter` prompt\)"):
        Adapted(adapters.Prompt(), llama, c).layout(asked)
