"""A name table says exactly where each of our numbers stands in a published file, in both directions."""

import numpy as np
import pytest

from jaxlm.core import weight_names
from jaxlm.core.spec import Spec, stacked, zeros
from jaxlm.core.weight_names import Name, fused, linear, same, vector

D, H, C, F, E, V = 4, 3, 2, 5, 2, 7
W = Spec((D, H, C), ("embed", "heads", None), zeros)
B = Spec((H, C), ("heads", None), zeros)


def ours(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def one(table: dict[str, Name], specs: dict) -> weight_names.Tensor:
    (tensor,) = weight_names.tensors(table, specs).values()
    return tensor


def heads_first(a: np.ndarray) -> np.ndarray:
    """Our [D, H, C] as PyTorch's Linear has it: [H * C, D]."""
    return a.reshape(D, -1).T


q, k, v = (ours(D, H, C) + 100 * i for i in range(3))
o = ours(H, C, D)
bias_q, bias_k = ours(H, C), ours(H, C) + 50
QKV = ("q", "k", "v")
w_up, w_gate = ours(E, D, F), ours(E, D, F) + 100
EXPERT = Spec((E, D, F), ("experts", "embed", "ffn"), zeros)

# name: entries of the table, specs, our weights, the file's tensor written out by hand
CASES = {
    "same": ({"q": same("x")}, {"q": W}, [q], q),
    "vector": ({"b": vector("x")}, {"b": B}, [bias_q], bias_q.reshape(-1)),
    "linear": ({"q": linear("x")}, {"q": W}, [q], heads_first(q)),
    "linear of two inputs": (
        {"o": linear("x", ins=2)},
        {"o": Spec((H, C, D), ("heads", None, "embed"), zeros)},
        [o],
        o.reshape(-1, D).T,
    ),
    "conv1d": ({"q": linear("x", order="in_out")}, {"q": W}, [q], q.reshape(D, -1)),
    "fused": (
        fused(linear, "x", *QKV),
        dict.fromkeys(QKV, W),
        [q, k, v],
        np.concatenate([heads_first(q), heads_first(k), heads_first(v)]),
    ),
    "fused with fewer key heads": (
        fused(linear, "x", "q", "k"),
        {"q": W, "k": Spec((D, 1, C), ("embed", "kv", None), zeros)},
        [q, k[:, :1]],
        np.concatenate([heads_first(q), k[:, 0].T]),
    ),
    "fused conv1d": (
        fused(linear, "x", *QKV, order="in_out"),
        dict.fromkeys(QKV, W),
        [q, k, v],
        np.concatenate([a.reshape(D, -1) for a in (q, k, v)], 1),
    ),
    "fused by head": (
        fused(linear, "x", *QKV, axis=-1),
        dict.fromkeys(QKV, W),
        [q, k, v],
        np.concatenate([part for h in range(H) for part in (q[:, h].T, k[:, h].T, v[:, h].T)]),
    ),
    "fused biases": (
        fused(vector, "x", "bq", "bk"),
        {"bq": B, "bk": B},
        [bias_q, bias_k],
        np.concatenate([bias_q.reshape(-1), bias_k.reshape(-1)]),
    ),
    "fused biases by head": (
        fused(vector, "x", "bq", "bk", axis=-1),
        {"bq": B, "bk": B},
        [bias_q, bias_k],
        np.stack([bias_q, bias_k], 1).reshape(-1),
    ),
    "all experts in one, [out, in]": (
        fused(linear, "x", "gate", "up"),
        {"gate": EXPERT, "up": EXPERT},
        [w_gate, w_up],
        np.concatenate([w_gate, w_up], 2).transpose(0, 2, 1),
    ),
    "all experts in one, [in, out], gate and up in turn": (
        fused(linear, "x", "gate", "up", order="in_out", axis=-1),
        {"gate": EXPERT, "up": EXPERT},
        [w_gate, w_up],
        np.stack([w_gate, w_up], 3).reshape(E, D, 2 * F),
    ),
    "biases of all experts in one": (
        {"b": vector("x")},
        {"b": Spec((E, F), ("experts", "ffn"), zeros)},
        [ours(E, F)],
        ours(E, F),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_number_is_where_the_file_has_it(case):
    table, specs, weights, file = CASES[case]
    tensor = one(table, specs)
    assert tensor.shape == file.shape
    np.testing.assert_array_equal(tensor.join(weights), file)
    for found, due in zip(tensor.split(np.ascontiguousarray(file)), weights, strict=True):
        np.testing.assert_array_equal(found, due)


@pytest.mark.parametrize("case", CASES)
def test_a_stretch_of_a_part_is_a_stretch_of_the_file(case):
    """What a shard needs is read alone: `View.at` names it."""
    table, specs, weights, file = CASES[case]
    for view, weight in zip(one(table, specs).views, weights, strict=True):
        part = weight.transpose(np.argsort(view.order))  # dimensions in the file's order
        where = [slice(size // 2, size) for size in part.shape]
        found = np.ascontiguousarray(file).reshape(view.shape)[view.at(where)]
        np.testing.assert_array_equal(found.reshape(part[tuple(where)].shape), part[tuple(where)])


def test_layers_and_experts_are_numbered():
    layer = {"norm": Spec((D,), (None,), zeros), "up": EXPERT}
    table = {
        "blocks/norm": vector("h.{layer}.norm", first=3),
        "blocks/up": linear("h.{layer}.experts.{expert}.up"),
        "embed": same("wte"),
        "head": same("lm_head"),
    }
    found = weight_names.tensors(table, {"embed": Spec((V, D), ("vocab", "embed"), zeros), "blocks": stacked(2, layer)})
    assert list(found) == [
        *("h.3.norm", "h.4.norm"),
        *(f"h.{i}.experts.{e}.up" for i in range(2) for e in range(2)),
        "wte",
    ]
    (part,) = found["h.1.experts.0.up"].parts
    assert (part.path, part.index, part.shape) == ("blocks/up", (1, 0), (D, F))
    assert found["h.1.experts.0.up"].shape == (F, D)


def test_a_group_without_some_of_its_members():
    table = fused(linear, "qkv", *QKV)
    assert [p.path for p in one(table, {"q": W, "v": W}).parts] == ["q", "v"]
    assert [p.path for p in one(table, {"k": W, "v": W}).parts] == ["k", "v"]


def test_a_weight_without_an_entry_and_two_of_one_name_are_slips():
    with pytest.raises(AssertionError, match=r"no entry in the name table for .*'q'"):
        weight_names.tensors({}, {"q": W})
    with pytest.raises(AssertionError, match="two entries for x"):
        weight_names.tensors({"q": linear("x"), "k": linear("x")}, {"q": W, "k": W})
