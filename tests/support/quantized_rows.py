"""Quantized matrices as other packages store them, written out loop by loop from their published layouts.

A row draws codes, scales and zero points, lays them into tensors as its format does, and says by the format's formula
which numbers they stand for. Nothing here comes from `jaxlm.formats.quantization`.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Made = tuple[dict[str, np.ndarray], np.ndarray]
"""The tensors by their last names, and the numbers [out, in] that they stand for."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Row(NamedTuple):
    config: dict[str, Any]
    """What config.json says as quantization_config."""
    make: Callable[[np.random.Generator, int, int], Made]


def stream(codes: list[int], bits: int, word: int = 32) -> list[int]:
    """Packs codes end to end, the lowest bits of the first word first."""
    whole = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    count = -(-len(codes) * bits // word)
    return [(whole >> (word * i)) & ((1 << word) - 1) for i in range(count)]


def packed(codes: np.ndarray, bits: int, axis: int, dtype: Any = np.uint32) -> np.ndarray:
    rows = np.moveaxis(codes, axis, -1)
    words = np.array([stream(list(r), bits, 8 * np.dtype(dtype).itemsize) for r in rows.reshape(-1, rows.shape[-1])])
    words = words.astype(dtype).view(f"i{np.dtype(dtype).itemsize}")
    return np.ascontiguousarray(np.moveaxis(words.reshape(*rows.shape[:-1], -1), -1, axis))


def half(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.random(shape) * 0.05 + 0.01).astype(np.float16)


def gptq(
    bits: int, group: int, *, version: int = 1, ordered: bool = False, middle: bool = False, word: Any = np.uint32
):
    def make(rng: np.random.Generator, outs: int, ins: int) -> Made:
        size = ins if group == -1 else group
        groups = -(-ins // size)
        codes = rng.integers(0, 1 << bits, (ins, outs))
        least = 0 if version == 2 else 1  # the first version can't say 0 without borrowing from its neighbour
        zeros = rng.integers(least, 1 << bits, (groups, outs))
        zeros = np.full_like(zeros, 1 << (bits - 1)) if middle else zeros
        scales = half(rng, groups, outs)
        g_idx = np.arange(ins) // size
        g_idx = rng.permutation(g_idx) if ordered else g_idx
        dense = np.empty((outs, ins), np.float32)
        for i in range(ins):
            for o in range(outs):
                g = g_idx[i]
                dense[o, i] = np.float32(scales[g, o]) * (int(codes[i, o]) - int(zeros[g, o]))
        stored = zeros - 1 if version == 1 else zeros
        tensors = dict(qweight=packed(codes, bits, 0, word), qzeros=packed(stored, bits, 1, word), scales=scales)
        if ordered or version == 2:
            tensors["g_idx"] = g_idx.astype(np.int32)
        return tensors, dense

    return make


def awq(layout: str, group: int = 32):
    def make(rng: np.random.Generator, outs: int, ins: int) -> Made:
        size = ins if group == -1 else group
        groups = ins // size
        codes, zeros = rng.integers(0, 16, (outs, ins)), rng.integers(0, 16, (outs, groups))
        scales = half(rng, outs, groups)
        dense = np.empty((outs, ins), np.float32)
        for o in range(outs):
            for i in range(ins):
                dense[o, i] = (int(codes[o, i]) - int(zeros[o, i // size])) * np.float32(scales[o, i // size])
        if layout == "gemm":
            order = [0, 2, 4, 6, 1, 3, 5, 7]

            def words(x: np.ndarray) -> np.ndarray:  # [n, out] → [n, out/8]
                out = np.zeros((x.shape[0], x.shape[1] // 8), np.uint32)
                for column in range(out.shape[1]):
                    for i in range(8):
                        out[:, column] |= x[:, column * 8 + order[i]].astype(np.uint32) << np.uint32(4 * i)
                return out.view(np.int32)

            scales_t = np.ascontiguousarray(scales.T)
            return dict(qweight=words(codes.T), qzeros=words(zeros.T), scales=scales_t), dense
        width = -(-groups // 8) * {32: 4, 64: 2}.get(size, 1)
        wide = np.zeros((outs, width * 8), np.float16)
        wide[:, :groups] = scales
        if layout == "gemv":
            filled = np.zeros((outs, width * 8), np.int64)
            filled[:, :groups] = zeros
            return dict(qweight=packed(codes, 4, 1), qzeros=packed(filled, 4, 1), scales=wide), dense
        added = np.zeros_like(wide)
        added[:, :groups] = -(scales * zeros.astype(np.float16))
        for o in range(outs):
            for i in range(ins):
                g = i // size
                dense[o, i] = int(codes[o, i]) * np.float32(scales[o, g]) + np.float32(added[o, g])
        interleaved = np.zeros((outs // 4, ins), np.uint16)
        for row in range(outs // 4):
            for block in range(ins // 64):
                flat = []
                for o in range(4):
                    for run in range(2):
                        first = block * 64 + run * 32
                        pairs = [
                            first + 8 * quarter + 2 * p + j for p in range(4) for quarter in range(4) for j in (0, 1)
                        ]
                        for eight in range(0, 32, 8):
                            flat += [codes[row * 4 + o, pairs[eight + k]] for k in (0, 2, 4, 6, 1, 3, 5, 7)]
                for w in range(64):
                    for k in range(4):
                        interleaved[row, block * 64 + w] |= np.uint16(int(flat[4 * w + k]) << (4 * k))
        scales_t, added_t = np.ascontiguousarray(wide.T), np.ascontiguousarray(added.T)
        return dict(qweight=interleaved.view(np.int16), scales=scales_t, qzeros=added_t), dense

    return make


def fp8(kind: str, name: str, block: int = 0, more: tuple[str, ...] = ()):
    def make(rng: np.random.Generator, outs: int, ins: int) -> Made:
        w = (rng.standard_normal((outs, ins)) * 50).astype(ml_dtypes.float8_e4m3fn)
        shape = {"one": (), "row": (outs, 1), "block": (-(-outs // max(block, 1)), -(-ins // max(block, 1)))}[kind]
        scale = (rng.random(shape) * 0.01 + 0.001).astype(np.float32)
        dense = np.empty((outs, ins), np.float32)
        for o in range(outs):
            for i in range(ins):
                at = {"one": (), "row": (o, 0), "block": (o // max(block, 1), i // max(block, 1))}[kind]
                dense[o, i] = np.float32(w[o, i]) * np.asarray(scale)[at]
        return dict(weight=w) | {name: np.asarray(scale)} | {n: np.ones((), np.float32) for n in more}, dense

    return make


def whole_numbers(bits: int, group: int, *, asymmetric: bool = False, ordered: bool = False, early: bool = False):
    """compressed-tensors' pack-quantized; `early`: codes that lie across words have none of their own yet."""

    def make(rng: np.random.Generator, outs: int, ins: int) -> Made:
        size = ins if group == -1 else group
        groups, middle = ins // size, 1 << (bits - 1)
        codes = rng.integers(-middle, middle, (outs, ins))
        zeros = rng.integers(-middle, middle, (outs, groups)) if asymmetric else np.zeros((outs, groups), int)
        scales = half(rng, outs, groups).astype(ml_dtypes.bfloat16)
        g_idx = np.arange(ins) // size
        g_idx = rng.permutation(g_idx) if ordered else g_idx
        dense = np.empty((outs, ins), np.float32)
        for o in range(outs):
            for i in range(ins):
                g = g_idx[i]
                dense[o, i] = (int(codes[o, i]) - int(zeros[o, g])) * np.float32(scales[o, g])
        words = packed(codes + middle, bits, 1)
        if early:
            each = 32 // bits
            words = np.array([[stream(r[i : i + each], bits)[0] for i in range(0, ins, each)]
                              for r in (codes + middle).tolist()], np.uint32).view(np.int32)  # fmt: skip
        tensors = dict(weight_packed=words, weight_scale=scales, weight_shape=np.array([outs, ins], np.int64))
        if asymmetric:
            tensors["weight_zero_point"] = packed(zeros + middle, bits, 0)
        if ordered:
            tensors["weight_g_idx"] = g_idx.astype(np.int32)
        return tensors, dense

    return make


def int8(kind: str, asymmetric: bool = False):
    def make(rng: np.random.Generator, outs: int, ins: int) -> Made:
        w = rng.integers(-127, 128, (outs, ins)).astype(np.int8)
        shape = {"one": (1,), "row": (outs, 1), "group": (outs, ins // 32)}[kind]
        scale = half(rng, *shape)
        zero = rng.integers(-20, 20, shape).astype(np.int8) if asymmetric else np.zeros(shape, np.int8)
        wide = {"one": lambda x: x, "row": lambda x: x, "group": lambda x: np.repeat(x, 32, 1)}[kind]
        dense = (w.astype(np.float32) - wide(zero).astype(np.float32)) * wide(scale).astype(np.float32)
        return dict(weight=w, weight_scale=scale) | (dict(weight_zero_point=zero) if asymmetric else {}), dense

    return make


def four_bit_floats(group: int, scale: str, names: tuple[str, ...] = ("weight_packed", "weight_scale", "")):
    def make(rng: np.random.Generator, outs: int, ins: int) -> Made:
        codes = rng.integers(0, 16, (outs, ins))
        both = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        if scale == "e8m0":
            e = rng.integers(118, 127, (outs, ins // group)).astype(np.uint8)
            dense = E2M1[codes] * np.repeat(2.0 ** (e.astype(np.float32) - 127), group, 1)
            return {names[0]: both, names[1]: e}, dense
        e = (rng.random((outs, ins // group)) * 100 + 1).astype(ml_dtypes.float8_e4m3fn)
        whole = np.float32(900.0) if names[2] == "weight_global_scale" else np.float32(1 / 900)
        factor = 1 / whole if names[2] == "weight_global_scale" else whole
        dense = E2M1[codes] * np.repeat(e.astype(np.float32) * factor, group, 1)
        return {names[0]: both, names[1]: e, names[2]: np.array([whole])}, dense

    return make


def nf4(nested: bool):
    def make(rng: np.random.Generator, outs: int, ins: int) -> Made:
        codes = rng.integers(0, 16, outs * ins)
        levels = np.sort(rng.standard_normal(16)).astype(np.float32)
        blocks = outs * ins // 64
        largest = (rng.random(blocks) * 0.1).astype(np.float32)
        state = dict(quant_type="nf4", blocksize=64, dtype="float16", shape=[outs, ins])
        tensors = dict(weight=(codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None])
        if nested:
            fine, table = rng.integers(0, 256, blocks).astype(np.uint8), np.linspace(-1, 1, 256, dtype=np.float32)
            coarse = (rng.random(-(-blocks // 256)) * 0.05).astype(np.float32)
            largest = table[fine] * coarse[np.arange(blocks) // 256] + np.float32(0.07)
            state |= dict(nested_blocksize=256, nested_offset=0.07, nested_dtype="float32")
            tensors |= {"weight.absmax": fine, "weight.nested_absmax": coarse, "weight.nested_quant_map": table}
        else:
            tensors["weight.absmax"] = largest
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors |= {"weight.quant_map": levels, "weight.quant_state.bitsandbytes__nf4": text}
        return tensors, (levels[codes] * np.repeat(largest, 64)).reshape(outs, ins)

    return make


def rows_by_largest(rng: np.random.Generator, outs: int, ins: int) -> Made:
    w, largest = rng.integers(-127, 128, (outs, ins)).astype(np.int8), rng.random(outs).astype(np.float32)
    tensors = dict(weight=w, SCB=largest, weight_format=np.zeros((), np.uint8))
    return tensors, w.astype(np.float32) * (largest / 127)[:, None]


def said(layout: str, **weights: Any) -> dict[str, Any]:
    weights = dict(num_bits=4, type="int", symmetric=True, strategy="group", dynamic=False) | weights
    group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
    return dict(quant_method="compressed-tensors", format=layout, quantization_status="compressed",
                config_groups=dict(group_0=group), ignore=["lm_head"])  # fmt: skip


GPTQ = dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=True)
AWQ = dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm")
PACKED = "pack-quantized"
STATIC = fp8("one", "weight_scale", 0, ("input_scale",))

ROWS = {
    "gptq": Row(GPTQ, gptq(4, 32, middle=True)),
    "gptq_zero_points": Row(GPTQ | dict(sym=False), gptq(4, 32)),
    "gptq_v2": Row(GPTQ | dict(sym=False, checkpoint_format="gptq_v2"), gptq(4, 32, version=2)),
    "gptq_v2_by_format": Row(GPTQ | dict(sym=False, format="gptq_v2"), gptq(4, 32, version=2)),
    "gptq_act_order": Row(GPTQ | dict(desc_act=True), gptq(4, 32, ordered=True)),
    "gptq_8": Row(GPTQ | dict(bits=8, group_size=-1), gptq(8, -1, ordered=True)),
    "gptq_3": Row(GPTQ | dict(bits=3), gptq(3, 32)),
    "gptq_2_bytes": Row(GPTQ | dict(bits=2, pack_dtype="int16"), gptq(2, 32, word=np.uint16)),
    "gptq_dynamic": Row(GPTQ | dict(bits=8, dynamic={r"+:.*": dict(bits=4, group_size=64)}), gptq(4, 64)),
    "awq": Row(AWQ, awq("gemm")),
    "awq_one_group": Row(AWQ | dict(group_size=-1), awq("gemm", -1)),
    "awq_gemv": Row(AWQ | dict(version="GEMV"), awq("gemv")),
    "awq_gemv_fast": Row(AWQ | dict(version="gemv_fast"), awq("gemv_fast")),
    "fp8_blocks": Row(dict(quant_method="fp8", weight_block_size=[48, 48]), fp8("block", "weight_scale_inv", 48)),
    "fp8_static": Row(dict(quant_method="fp8", activation_scheme="static"), STATIC),
    "fbgemm_fp8": Row(dict(quant_method="fbgemm_fp8"), fp8("row", "weight_scale")),
    "modelopt_fp8": Row(dict(quant_method="modelopt", quant_algo="FP8"), STATIC),
    "modelopt_nvfp4": Row(dict(quant_method="modelopt", quant_algo="NVFP4"),
                          four_bit_floats(16, "e4m3", ("weight", "weight_scale", "weight_scale_2"))),
    "nf4": Row(dict(quant_method="bitsandbytes", load_in_4bit=True), nf4(False)),
    "nf4_nested": Row(dict(quant_method="bitsandbytes", load_in_4bit=True), nf4(True)),
    "bitsandbytes_int8": Row(dict(quant_method="bitsandbytes", load_in_8bit=True), rows_by_largest),
    "packed": Row(said(PACKED, group_size=32), whole_numbers(4, 32)),
    "packed_asymmetric": Row(said(PACKED, group_size=32, symmetric=False), whole_numbers(4, 32, asymmetric=True)),
    "packed_act_order": Row(said(PACKED, group_size=32, actorder="group"), whole_numbers(4, 32, ordered=True)),
    "packed_channel": Row(said(PACKED, strategy="channel", num_bits=8), whole_numbers(8, -1)),
    "packed_3": Row(said(PACKED, num_bits=3, group_size=32), whole_numbers(3, 32, asymmetric=True)),
    "packed_3_early": Row(said(PACKED, num_bits=3, group_size=32), whole_numbers(3, 32, early=True)),
    "int8_channel": Row(said("int-quantized", num_bits=8, strategy="channel"), int8("row")),
    "int8_tensor": Row(said("naive-quantized", num_bits=8, strategy="tensor", symmetric=False), int8("one", True)),
    "int8_group": Row(said("naive-quantized", num_bits=8, group_size=32, symmetric=False), int8("group", True)),
    "float8_channel": Row(said("float-quantized", num_bits=8, type="float", strategy="channel"),
                          fp8("row", "weight_scale")),
    "float8_blocks": Row(said("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[48, 48]),
                         fp8("block", "weight_scale", 48, ("input_scale",))),
    "nvfp4": Row(said("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
                 four_bit_floats(16, "e4m3", ("weight_packed", "weight_scale", "weight_global_scale"))),
    "mxfp4_packed": Row(said("mxfp4-pack-quantized", type="float", group_size=32), four_bit_floats(32, "e8m0")),
}  # fmt: skip
