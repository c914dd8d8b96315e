"""A smaller model computes what the larger one did as far as what went sent on nothing, or was a copy of what stays."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from support.sized_models import Tiny, batch_of, model_of, run, tiny, widened

from jaxlm.core import spec, tree
from jaxlm.nn import losses
from jaxlm.nn.moe import Moe
from jaxlm.weights import matrices
from jaxlm.weights.compress import recording
from jaxlm.weights.shrink import choice, compensation, duplicates, importance, units
from jaxlm.weights.shrink.units import CHANNELS, Units


def logits(made: Tiny) -> np.ndarray:
    model, weights = made
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda w, b: losses.logits(model.readout(w, model.forward(w, b).x_BTD), model.shard))
        return np.asarray(out(weights, batch_of(model)))


def smaller(made: Tiny, by: str, **sizes: Any) -> tuple[Tiny, dict[Units, np.ndarray]]:
    """The model with fewer units, chosen by what random tokens make them send on, or by weights."""
    model, weights = made
    small = model_of(model.family, dataclasses.replace(model.config, **sizes))
    changed, found = units.changes(model.specs, small.specs), matrices.matrices(model.family, model.config)
    for one in changed:
        if one.axis in ("heads", "ffn"):
            weights, _ = duplicates.merged(model.specs, weights, one)
        if one == CHANNELS:
            weights, _ = duplicates.merged_channels(model.specs, weights, found)
    inside = [one for one in changed if one.axis in ("heads", "ffn", "experts")]
    if by == "activation":
        wanted = {path: found[path] for one in inside for path in units.ends(model.specs, one)}
        wanted |= importance.readers(found) if CHANNELS in changed else {}
        batch = batch_of(model)
        _, records = jax.jit(lambda w: recording.observe(
            lambda bound: model.forward(bound, batch).x_BTD, w, wanted, np.ones((2, 6), np.float32), hessian=False
        ))(weights)  # fmt: skip
        squares = {path: np.asarray(record.mean_square) for path, record in records.items()}
        scores = {one: importance.by_inputs(model.specs, weights, one, squares) for one in inside}
        seen = {path: squares[path] for path in importance.readers(found) if path in squares}
    else:
        scores, seen = {one: importance.by_weights(model.specs, weights, one) for one in inside}, None
    if CHANNELS in changed:
        scores[CHANNELS] = importance.channels(model.specs, weights, found, seen)
    chosen = choice.choose(model.specs, changed, scores)
    out = units.selected(model.specs, small.specs, weights, chosen)
    if CHANNELS in chosen:
        share = importance.energy(model.specs, weights, chosen[CHANNELS], seen)
        norms = {path: 0.0 for path, s in tree.flatten(model.specs, spec.is_spec).items() if s.role == "norm"}
        out = importance.rescaled(model.specs, small.specs, out, share, norms)
    shapes = {path: s.shape for path, s in tree.flatten(small.specs, spec.is_spec).items()}
    assert {path: w.shape for path, w in tree.flatten(out).items()} == shapes
    return Tiny(small, out), chosen


def silenced(made: Tiny, silent: dict[str, dict[int, list[int]]]) -> Tiny:
    """The model with units of some axes whose values, gates or products are zero, by layer."""
    model, weights = made
    for path, s in tree.flatten(model.specs, spec.is_spec).items():
        name = path.rpartition("/")[2].removeprefix("cross_")
        for axis, by_layer in silent.items():
            if axis not in s.axes or name.removesuffix("_bias") not in ("v", "v_b", "up", "gate"):
                continue
            w = tree.at(weights, path).copy()
            for layer, at in by_layer.items():
                np.moveaxis(w[layer % len(w)], s.axes.index(axis) - 1, 0)[at] = 0
            weights = tree.put(weights, path, w)
    return Tiny(model, weights)


@pytest.mark.parametrize(
    ("name", "sizes", "silent"),
    [
        ("llama", dict(heads=2, kv_heads=1, ffn=9), {"kv": {0: [0], 1: [1]}, "ffn": {0: [0, 5, 7], 1: [2, 3, 11]}}),
        ("t5", dict(heads=1, ffn=10), {"kv": {0: [1], 1: [1]}, "ffn": {0: [4, 8], 1: [0, 1]}}),
        ("gpt2", dict(ffn=10), {"ffn": {0: [0, 1], 1: [10, 11]}}),
        *[pytest.param(*row, marks=pytest.mark.slow) for row in (
            ("gemma2", dict(ffn=9), {"ffn": {0: [0, 5, 7], 1: [2, 3, 11]}}),
            ("bert", dict(ffn=9), {"ffn": {0: [0, 5, 7], 1: [2, 3, 11]}}),
            ("modernbert", dict(ffn=9), {"ffn": {i: [i, 5, 7] for i in range(4)}}),
            ("mbart", dict(ffn=9), {"ffn": {0: [0, 5, 7], 1: [2, 3, 11]}}),
            ("llama_wide", dict(heads=3, kv_heads=1), {"kv": {0: [0], 1: [1]}}),
            ("deepseek", dict(heads=1), {"heads": {i: [i % 2] for i in range(4)}}),
        )],
    ],
)  # fmt: skip
@pytest.mark.parametrize("by", ["activation", "magnitude"])
def test_units_whose_activations_are_zero_go_without_a_trace(one_device, by, name, sizes, silent):
    made = silenced(tiny(name), silent)
    small, chosen = smaller(made, by, **sizes)
    np.testing.assert_allclose(logits(small), logits(made), atol=1e-5)
    for one, at in chosen.items():
        gone = silent.get(one.axis, {})
        for layer, missing in gone.items() if name in ("llama", "gpt2") else ():
            assert not set(at[layer].tolist()) & set(missing), one


def test_channels_that_are_always_zero_go_without_a_trace(one_device):
    model, weights = tiny("llama")
    model = model_of(model.family, dataclasses.replace(model.config, eps=1e-12))  # what a norm adds isn't scaled
    for path, dim in importance.writers(model.specs).items():
        w = tree.at(weights, path).copy()
        np.moveaxis(w, dim, 0)[[1, 6]] = 0
        weights = tree.put(weights, path, w)
    made = Tiny(model, weights)
    small, chosen = smaller(made, "activation", width=6)
    assert chosen[CHANNELS].tolist() == [0, 2, 3, 4, 5, 7]
    np.testing.assert_allclose(logits(small), logits(made), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "noise"),
    [(dict(ffn=20, heads=8, kv_heads=4), 0.3), (dict(width=16), 0.0), (dict(width=16), 0.3)],
)
def test_what_grow_copied_is_found_and_taken_out_again(one_device, sizes, noise):
    original, large = tiny("llama"), widened("llama", noise, **sizes)
    back = {name: getattr(original.model.config, name) for name in sizes}
    small, _ = smaller(large, "activation", **back)
    np.testing.assert_allclose(logits(small), logits(original), atol=2e-5)
    for path in ("blocks/up", "blocks/down", "blocks/v", "blocks/o"):
        was, now = tree.at(original.weights, path), tree.at(small.weights, path)
        np.testing.assert_allclose(now, was, atol=1e-5, err_msg=path)


def test_experts_without_weight_go_and_routers_follow(one_device):
    name, sizes = "deepseek", dict(moe=Moe(experts=3, top_k=2, ffn=12, balance=0.0))
    model, weights = tiny(name)
    down = weights["blocks"]["experts"]["down"].copy()
    down[0, 3], down[1, 0] = 0, 0
    made = Tiny(model, tree.put(weights, "blocks/experts/down", down))
    small, chosen = smaller(made, "magnitude", **sizes)
    assert chosen[Units("blocks/", "experts")].tolist() == [[0, 1, 2], [1, 2, 3]]
    np.testing.assert_array_equal(small.weights["blocks"]["router"][1], weights["blocks"]["router"][1][:, 1:])
    np.testing.assert_array_equal(
        small.weights["blocks"]["experts"]["up"][1], weights["blocks"]["experts"]["up"][1, 1:]
    )


def test_layers_that_share_biases_by_distance_keep_the_same_heads():
    model, _ = tiny("t5")
    assert units.shared(model.specs, Units("encoder/blocks/", "heads"))
    assert not units.shared(model.specs, Units("decoder/blocks/cross_", "heads"))
    small = model_of(model.family, dataclasses.replace(model.config, heads=1))
    changed = units.changes(model.specs, small.specs)
    scores = {one: np.array([[3.0, 1.0], [0.0, 5.0]]) for one in changed if one.axis == "heads"}
    scores = {one: s[: len(s) if "encoder" in one.place else 1] for one, s in scores.items()}
    chosen = choice.choose(model.specs, changed, scores)
    assert chosen[Units("encoder/blocks/", "heads")].tolist() == [[1], [1]]
    assert chosen[Units("encoder/blocks/", "kv")].tolist() == [[1], [1]]


def test_groups_go_whole_or_lose_as_many_heads_each():
    scores = np.array([[9.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    heads, groups = choice.best_heads(scores, 3, 4, 2)
    assert (heads.tolist(), groups.tolist()) == ([[0, 1, 4, 5]], [[0, 2]])
    heads, groups = choice.best_heads(scores, 3, 3, 3)
    assert (heads.tolist(), groups.tolist()) == ([[0, 3, 5]], [[0, 1, 2]])
    assert (choice.kv_heads(12, 4, 6), choice.kv_heads(12, 4, 4), choice.kv_heads(6, 2, 4)) == (2, 4, 2)
    for refused, says in {(6, 4, 5): "5 are neither whole groups of 3", (6, 4, 7): "7 are neither"}.items():
        with pytest.raises(ValueError, match=f"^heads: {says}"):
            choice.kv_heads(12, 4, refused[2])
    with pytest.raises(ValueError, match="kv_heads: 1 would leave 4 heads to each, where the model has 2"):
        choice.best_heads(scores, 3, 4, 1)


@pytest.mark.parametrize(
    ("name", "sizes", "says"),
    [
        ("gpt2", dict(heads=1), "sizes: blocks/k can't go from 4 to 8 along None; heads keep their width"),
        ("llama", dict(ffn=13), "ffn: blocks/down would grow from 12 to 13"),
        ("llama", dict(vocab=7), "sizes: embed can't go from 11 to 7 along vocab"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, sizes, says):
    model = tiny(name).model
    with pytest.raises(ValueError, match=says):
        units.changes(model.specs, model.family.specs(dataclasses.replace(model.config, **sizes)))


def test_what_stays_makes_up_for_what_goes_as_well_as_it_can():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((400, 6)), rng.standard_normal((6, 3))
    x[:, 4] = x[:, 0] - 2 * x[:, 1]
    H, kept = x.T @ x / len(x), np.array([0, 1, 2, 5])
    made, missed = compensation.compensated(w, H, kept)
    best, *_ = np.linalg.lstsq(x[:, kept], x @ w, rcond=None)
    np.testing.assert_allclose(made, best, atol=1e-4)
    true = np.square(x @ w - x[:, kept] @ made).sum() / np.square(x @ w).sum()
    assert missed == pytest.approx(true, rel=1e-4)
    plain = np.square(x @ w - x[:, kept] @ w[kept]).sum() / np.square(x @ w).sum()
    assert true < plain / 2
    without_third, missed = compensation.compensated(
        np.delete(w, 3, 0), np.delete(np.delete(H, 3, 0), 3, 1), np.arange(3)
    )
    assert missed < 0.6  # input 5 is missing; 4 is made of what stays
    np.testing.assert_allclose(without_third[0], w[0] + w[4], atol=0.2)


def test_first_order_products_are_the_derivative_of_dropping(one_device):
    made = tiny("llama")
    one = Units("blocks/", "ffn")
    grads = run(*made)[1]
    path = units.ends(made.model.specs, one)[0]
    product = (tree.at(made.weights, path) * grads[path]).sum(-1)
    scores = importance.by_products(made.model.specs, one, {path: np.stack([product, -product])})
    np.testing.assert_allclose(scores, np.abs(product), rtol=1e-5)
