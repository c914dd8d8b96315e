"""Blocks of few bits: as llama.cpp reads them, with no more error than its own, mixed as in its types of files."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support import gguf_rows
from support.gguf_rows import MIXED

from jaxlm.core import weight_names
from jaxlm.core.spec import is_spec
from jaxlm.formats import gguf_file_types, gguf_importance, gguf_names, gguf_scales, gguf_write
from jaxlm.formats.gguf_quants import KINDS, encode
from jaxlm.models import MODELS

gguf = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf"
BLOCKS = np.load(GOLDEN / "blocks.npz")
MIXTURES = json.loads((GOLDEN / "mixtures.json").read_text())
WEIGHTED = [(kind, weighted) for kind in KINDS for weighted in (False, True)]


def decoded(data: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def errors(rows: np.ndarray, data: np.ndarray, kind: str, importance: np.ndarray | None) -> np.ndarray:
    """The weighted squared error of each block."""
    off = (decoded(data, kind).astype(np.float64) - rows) ** 2 * (1 if importance is None else importance)
    return off.reshape(-1, KINDS[kind].size).sum(1)


# ---------------------------------------------------------------------------------------------- beside llama.cpp's own


@pytest.mark.parametrize(("kind", "weighted"), WEIGHTED)
def test_no_block_has_more_error_than_llama_cpps(kind: str, weighted: bool) -> None:
    rows, importance = gguf_rows.numbers()
    weights = importance if weighted else None
    theirs = errors(rows, BLOCKS[f"{kind} weighted" if weighted else kind], kind, weights)
    ours = errors(rows, encode(rows, kind, weights), kind, weights)
    assert (ours <= theirs * (1 + 1e-5) + 1e-12).all(), (ours / theirs).max()
    if kind != "Q8_0":
        assert ours.sum() < 0.995 * theirs.sum()


@pytest.mark.parametrize(("kind", "weighted"), [(k, w) for k, w in WEIGHTED if k.endswith("_K") or k == "Q8_0"])
def test_the_first_scales_are_llama_cpps_bit_for_bit(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_scales, "ROUNDS", 0)
    rows, importance = gguf_rows.numbers()
    made = encode(rows, kind, importance if weighted else None)
    np.testing.assert_array_equal(decoded(made, kind), decoded(BLOCKS[f"{kind} weighted" if weighted else kind], kind))


@pytest.mark.parametrize("name", MIXED)
def test_tensors_have_the_kinds_that_llama_cpp_gives_them(name: str) -> None:
    family_name, c = MIXED[name]
    family = MODELS[family_name]
    values, table = gguf_names.complete(family.to_hf(c)), weight_names.tensors(family.names(c), family.specs(c))
    for file_type, due in MIXTURES[name].items():
        file_type, _, weighted = file_type.partition(" ")
        stored = gguf_write._plan(file_type, values, table, {} if weighted else None)
        others = {tensor: kind for kind, names in due.items() if kind != "most" for tensor in names.split()}
        for tensor, s in stored.items():
            assert s.kind in ("F32", others.get(tensor, due["most"])), (file_type, tensor)
            assert (s.kind == "F32") == (len(s.shape) == 1 or tensor.split(".")[-2] in gguf_file_types.IN_F32)


# ---------------------------------------------------------------------------------------------------------- any numbers


def bound(x: np.ndarray, kind: str) -> np.ndarray:
    """How far any number of a sub-block `[…, N]` may be off: half a step of the plain grid over its range, with what
    rounding the scales of a super-block to six or eight bits, and of all to float16, adds."""
    k = KINDS[kind]
    bits = int(kind[1])
    reach = np.abs(x).max(-1)
    if bits == 8:
        return reach / 127 * 0.5 + reach * 2**-10 + 127 * 2**-25
    steps = (1 << (bits - 1)) if kind in ("Q4_0", "Q5_0", "Q6_K") else (1 << bits) - 1
    span = reach if kind in ("Q4_0", "Q5_0", "Q6_K") else np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)
    together = k.size // k.shared
    whole = np.repeat(reach.reshape(-1, together).max(-1), together)
    return 1.5 * span / steps + whole / 20 + 1e-4


@pytest.mark.parametrize(("kind", "weighted"), WEIGHTED)
def test_errors_are_bounded_for_numbers_of_any_kind(kind: str, weighted: bool) -> None:
    """Zeros come back exactly; outliers, constants, tiny and large numbers stay within a few steps of their block."""
    rng = np.random.default_rng(1)
    for shape in ((1, 256), (3, 512), (5, 768), (130, 256)):
        rows = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3, (shape[0], 1))
        rows[rng.random(shape) < 0.1] = 0
        rows[-1, ::97] *= 50
        rows = rows.astype(np.float32)
        rows[0] = 0
        importance = rng.random(shape[1]).astype(np.float32) if weighted else None
        back = decoded(encode(rows, kind, importance), kind)
        assert not back[0].any()
        off = (np.abs(back - rows)).reshape(-1, KINDS[kind].shared)
        worst = np.sqrt((off**2).mean(-1))
        assert (worst <= bound(rows.reshape(-1, KINDS[kind].shared), kind)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_encoded_twice_stays(kind: str) -> None:
    rng = np.random.default_rng(2)
    once = decoded(encode(rng.standard_normal((4, 512)).astype(np.float32), kind), kind)
    twice = decoded(encode(once, kind), kind)
    assert np.sqrt(((twice - once) ** 2).mean()) < 0.004 * once.std()


def test_columns_that_matter_are_nearer() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((8, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 4 == 0, 100.0, 0.0).astype(np.float32)
    for kind in set(KINDS) - {"Q8_0"}:
        plain, weighted = (np.abs(decoded(encode(rows, kind, w), kind) - rows) for w in (None, importance))
        assert weighted[:, ::4].mean() < 0.9 * plain[:, ::4].mean()
        assert weighted.max() < 2, "columns that count for nothing are still rounded to near numbers"


@pytest.mark.parametrize(
    ("change", "importance", "says"),
    [
        (np.nan, None, "holds NaN or infinity"),
        (np.inf, None, "holds NaN or infinity"),
        (1e5, None, "holds numbers beyond 65504, the range of Q4_K"),
        (0.0, np.zeros(256, np.float32), "has importance that is negative, not finite or zero for all columns"),
        (0.0, np.full(256, -1, np.float32), "has importance that is negative"),
        (0.0, np.full(256, np.nan, np.float32), "has importance that is negative, not finite"),
        (0.0, np.ones(255, np.float32), r"has importance of shape \(255,\) for 256 columns"),
    ],
)
def test_what_can_not_be_encoded_is_refused(change: float, importance: np.ndarray | None, says: str) -> None:
    rows = np.ones((2, 256), np.float32)
    rows[1, 3] = change
    with pytest.raises(ValueError, match=says):
        encode(rows, "Q4_K", importance)


# -------------------------------------------------------------------------------------------------- importance matrices


def test_importance_comes_back_and_goes_to_its_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    importance = {"blk.0.attn_q.weight": rng.random(64), "blk.0.ffn_down_exps.weight": rng.random((4, 96))}
    gguf_importance.write(tmp_path / "i.gguf", importance, 1000, 512, "text.txt")
    back = gguf_importance.read(tmp_path / "i.gguf")
    assert back.keys() == importance.keys()
    for name, means in importance.items():
        np.testing.assert_allclose(back[name], means, rtol=1e-6)
    fields = gguf.GGUFReader(tmp_path / "i.gguf").fields
    assert fields["general.type"].contents() == "imatrix" and fields["imatrix.chunk_count"].contents() == 2
    assert "general.architecture" not in fields


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_mean_squares_of_inputs_go_to_the_columns_of_the_file(name: str) -> None:
    """GPT-2's file has queries, keys and values in one tensor, which our weights have apart."""
    family_name, c = MIXED[name]
    family = MODELS[family_name]
    specs = family.specs(c)
    rng = np.random.default_rng(5)
    down, q = ("down", "q")
    means = {f"blocks/{down}": rng.random((c.layers, c.ffn)), f"blocks/{q}": rng.random((c.layers, c.width))}
    means |= {f"blocks/{n}": means["blocks/q"] for n in ("k", "v") if name == "gpt2"}
    made = gguf_write.importance_of(family, c, specs, means)
    first = "attn_qkv" if name == "gpt2" else "attn_q"
    assert len(made) == 2 * c.layers
    np.testing.assert_array_equal(made["blk.3.ffn_down.weight"], means["blocks/down"][3].astype(np.float32))
    np.testing.assert_array_equal(made[f"blk.5.{first}.weight"], means["blocks/q"][5].astype(np.float32))


def test_importance_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    family_name, c = MIXED["8 experts"]
    family = MODELS[family_name]
    specs = family.specs(c)
    zeros = jax.tree.map(lambda s: jax.numpy.zeros(s.shape), specs, is_leaf=is_spec)
    for importance, says in (
        ({"blk.0.attn_x.weight": np.ones(256)}, "blk.0.attn_x.weight is no tensor of this model"),
        ({"blk.0.attn_q.weight": np.ones(128)}, r"blk.0.attn_q.weight has shape \(128,\), not \(256,\)"),
        ({"blk.0.ffn_up_exps.weight": np.ones(256)}, r"has shape \(256,\), not \(8, 256\)"),
    ):
        with pytest.raises(ValueError, match=says):
            gguf_write.save(tmp_path / "x.gguf", family, c, specs, zeros, file_type="q4_k_m", importance=importance)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"m\.gguf: not an importance matrix"):
        gguf_importance.read(tmp_path / "m.gguf")
    (tmp_path / "t.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"t\.gguf: "):
        gguf_importance.read(tmp_path / "t.gguf")
    with pytest.raises(ValueError, match="no such file"):
        gguf_importance.read(tmp_path / "absent.gguf")
