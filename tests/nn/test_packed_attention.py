"""Documents of packed rows by cuDNN's layout: what is handed to the kernel and what is made of its results, with a
stand-in that reads and writes memory as cuDNN does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cudnn import DTYPE, install

from jaxlm.core import config
from jaxlm.nn import attention
from jaxlm.nn.attention import choose
from jaxlm.nn.kernels import packed_attention
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask
from jaxlm.runtime.mesh import make_mesh, on_mesh


@pytest.fixture
def cudnn(monkeypatch):
    return install(monkeypatch)


def rows(name: str, T: int, B: int = 2) -> np.ndarray:
    """Segments: runs of numbers in each row, and padding at the end of one."""
    rng = np.random.default_rng(T)
    out = np.zeros((B, T), np.int32)
    for b in range(B):
        cuts = {"few": 2, "many": 3 * T // 8}[name]
        out[b] = np.searchsorted(np.sort(rng.choice(np.arange(1, T), cuts, replace=False)), np.arange(T), "right") + 1
    out[1, -T // 8 :] = 0
    return out


CASES = [
    # documents, causal, window, query heads, key heads, head width
    ("few", True, None, 4, 2, 16),
    ("many", True, None, 2, 2, 8),
    ("many", True, 9, 4, 1, 8),
    ("many", False, None, 4, 2, 8),
]


@pytest.mark.parametrize(("name", "causal", "window", "H", "K", "C"), CASES)
def test_values_and_gradients_are_those_of_plain_attention(cudnn, name, causal, window, H, K, C):
    T = 32
    segments = rows(name, T)
    rng = np.random.default_rng(0)
    q, k, v, pull = (jnp.asarray(rng.standard_normal((2, T, n, C)), DTYPE) for n in (H, K, K, H))
    mask = Mask(causal, window, segments, segments, packed=True)

    def both(which: str, dtype: str) -> list[jax.Array]:
        shard = Layout(execution=config.Execution(attention=which, dtype=dtype))
        f = lambda *x: attention.attend(*x, mask, shard=shard)  # noqa: E731
        out, back = jax.vjp(f, *(x.astype(dtype) for x in (q, k, v)))
        return [f(*(x.astype(dtype) for x in (q, k, v))), out, *back(pull.astype(dtype))]

    found, expected = jax.jit(lambda: (both("cudnn", DTYPE), both("xla", "float32")))()
    for what, a, b in zip(("alone", "values", "d q", "d k", "d v"), found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.06, rtol=0.03, err_msg=what)
    assert set(cudnn.calls) == {2 * 4}  # room for four documents a row, however many there are


def test_documents_beyond_a_call_are_computed_by_further_ones(cudnn, monkeypatch):
    counted = []
    real = packed_attention.offsets
    monkeypatch.setattr(
        packed_attention, "offsets",
        lambda number, call, D: jax.debug.callback(lambda n: counted.append(int(n)), call) or real(number, call, D),
    )  # fmt: skip
    x = [jnp.ones((2, 32, 1, 8), DTYPE)] * 3
    run = jax.jit(partial(packed_attention._local, packed_attention.How(True, None, 1.0)))
    for name in ("few", "many"):
        counted.clear()
        segments = rows(name, 32)
        count = sum(1 + int((np.diff(row) != 0).sum()) for row in segments)  # a call has room for two rows' four
        jax.block_until_ready(run(*x, segments))
        jax.effects_barrier()
        assert sorted(counted) == list(range(-(-count // 8)))
        assert len(counted) == 1 if name == "few" else len(counted) > 2


def test_offsets_of_documents_are_counted_over_all_rows():
    segments = jnp.asarray([[1, 1, 2, 2], [2, 3, 3, 0]], jnp.int32)  # a number that goes on in the next row begins anew
    number = packed_attention.number_documents(segments)
    assert number.tolist() == [[0, 0, 1, 1], [2, 3, 3, 4]]
    assert packed_attention.offsets(number, 0, 4).tolist() == [0, 2, 4, 5, 7]
    assert packed_attention.offsets(number, 1, 4).tolist() == [7, 8, 8, 8, 8]


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"tensor": 2, "axis_type": "explicit"}])
def test_each_device_of_a_mesh_has_the_documents_of_its_own_rows(cudnn, sizes):
    segments, mesh = rows("many", 16, 4), make_mesh(config.Mesh(**sizes))
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.standard_normal((4, 16, n, 8)), DTYPE) for n in (4, 2, 2)]

    def total(*x: jax.Array, which: str, dtype: str, segments: jax.Array) -> jax.Array:
        shard = Layout.of(config.Mesh(**sizes), config.Execution(attention=which, dtype=dtype))
        mask = Mask(True, None, segments, segments, packed=True)
        return jnp.sum(attention.attend(*x, mask, shard=shard).astype(jnp.float32) ** 2)

    grads = jax.grad(total, (0, 1, 2))
    alone = jax.jit(lambda *x: grads(*x, which="cudnn", dtype=DTYPE, segments=segments))(*x)
    with on_mesh(mesh):
        split = jax.jit(lambda s, *x: grads(*x, which="cudnn", dtype=DTYPE, segments=s))(segments, *x)
    assert cudnn.calls[0] == 4 * 2 > cudnn.calls[-1]  # room for two documents a row, and a device has fewer rows
    for a, b in zip(alone, split, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.05, rtol=0.02)


def test_rows_that_are_one_document_need_neither_a_mask_nor_offsets(cudnn, monkeypatch):
    seen = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **more: seen.append(more) or jnp.zeros_like(q)
    )  # fmt: skip
    x, segments = [jnp.ones((2, 16, 1, 8), DTYPE)] * 3, jnp.ones((2, 16), jnp.int32)
    shard = Layout(execution=config.Execution(attention="cudnn"), one_document=True)
    for mask, expected in (
        (Mask(True, None, segments, segments, packed=True), dict(is_causal=True)),
        (Mask(True, 5, segments, segments, packed=True), dict(is_causal=True, local_window_size=(4, 0))),
    ):
        attention.attend(*x, mask, shard=shard, scale=1.0)
        assert seen.pop() == dict(implementation="cudnn", scale=1.0) | expected
    shared = Layout(execution=config.Execution(attention="cudnn"), shared_keys=True)
    attention.attend(*x, Mask(True, None, segments, segments, packed=True), shard=shared)
    assert seen.pop()["mask"].shape == (2, 1, 16, 16)  # virtual tokens are of all documents
    assert not cudnn.calls


# ------------------------------------------------------------------------------------------------- which one, and why


def described(mask: Mask, bias: bool = False, **options) -> str:
    return choose("auto", mask, bias, None, DTYPE, **options).describe()


def test_what_keeps_documents_apart_is_said(cudnn):
    before = "cudnn (fused kernel of this GPU; documents of a row by"
    assert described(Mask(True, packed=True)) == f"{before} where they begin and end)"
    dense = f"{before} a mask of all pairs, as"
    assert described(Mask(True)) == f"{dense} there are keys that other documents' or later queries see, too)"
    assert described(Mask(True, packed=True), bias=True) == f"{dense} there is a bias on scores)"
    assert described(Mask(False, 8, packed=True)) == f"{dense} cuDNN has no window to both sides)"
    assert described(Mask(True, packed=True), mapped=True) == f"{dense} this is mapped over workers or stages)"


def test_an_older_gpu_and_an_unknown_jax_keep_the_mask_and_say_so(cudnn, monkeypatch):
    private = packed_attention._private()
    operands = {name: each | {"another"} for name, each in private.operands.items()}
    monkeypatch.setattr(
        packed_attention, "_private",
        lambda: packed_attention._Private(None, None, "causal", "all", private.layout, operands),
    )  # fmt: skip
    found = described(Mask(True, packed=True))
    assert f"jax {jax.__version__} has another interface to cuDNN than those that are known" in found
    monkeypatch.setattr(packed_attention.chips, "compute_capability", lambda device: (8, 9))
    assert "as this needs a Hopper GPU (compute capability 9.0) or a later one" in described(Mask(True, packed=True))


def test_this_jax_is_one_whose_interface_is_known():
    assert packed_attention._versions() is None


def test_head_widths_that_cudnn_does_not_take_are_not_given_to_it(cudnn, monkeypatch):
    assert choose("auto", Mask(True), False, None, DTYPE, widths=(256, 256)).implementation == "cudnn"
    for width in (20, 264):
        found = choose("auto", Mask(True), False, None, DTYPE, widths=(width, width))
        assert found.describe() == (
            f"xla (cudnn takes heads whose width is a multiple of 8 up to 256 on this GPU, not {width})"
        )
    monkeypatch.setattr(packed_attention.chips, "compute_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"multiple of 8 up to 128 on this GPU, not 136; use auto or xla"):
        choose("cudnn", Mask(True), False, None, DTYPE, widths=(136, 136))


def test_too_many_numbers_for_cudnn_are_refused():
    x = jax.ShapeDtypeStruct((1 << 13, 1 << 11, 2, 64), DTYPE)
    with pytest.raises(ValueError, match=r"train\.micro_batches: queries of 2,147,483,648 numbers a device"):
        jax.eval_shape(
            lambda q, s: packed_attention._local(packed_attention.How(True, None, 1.0), q, q, q, s),
            x, jax.ShapeDtypeStruct(x.shape[:2], jnp.int32),
        )  # fmt: skip
