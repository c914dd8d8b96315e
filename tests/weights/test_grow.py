"""A grown model computes the same, and all that is new in it learns."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from support.sized_models import Tiny, model_of, run, tiny, widened

from jaxlm.core import spec, tree
from jaxlm.models import MODELS
from jaxlm.nn.moe import Moe
from jaxlm.weights.grow import depth, experts, vocabulary, width

before = functools.cache(lambda name: run(*tiny(name))[:2])


def grown_blocks(name: str, blocks: int) -> tuple[Tiny, depth.Plan]:
    model, weights = tiny(name)
    plan = depth.expansion(model.specs, blocks)
    larger = model_of(model.family, depth.config(model.config, model.specs, plan))
    return Tiny(larger, depth.weights(model.specs, weights, plan)), plan


def same_gradients(found: dict[str, np.ndarray], mapped: dict[str, np.ndarray], but: frozenset = frozenset()) -> None:
    """The gradients of a grown model are those that were mapped; `but` names weights whose can't be."""
    assert mapped.keys() <= found.keys()
    for path in mapped.keys() - but:
        largest = np.abs(mapped[path]).max()
        np.testing.assert_allclose(found[path], mapped[path], atol=1e-5 * largest + 1e-7, err_msg=path)


def same_shapes(made: Tiny) -> None:
    shapes = {path: s.shape for path, s in tree.flatten(made.model.specs, spec.is_spec).items()}
    assert {path: w.shape for path, w in tree.flatten(made.weights).items()} == shapes


def slow(*rows: Any) -> list[Any]:
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("llama", 2), ("gemma2", 2), *slow(("gpt2", 2), ("smollm3", 1), ("olmo", 1), ("t5", 1), ("mbart", 1),
                                        ("modernbert", 2), ("deepseek", 2), ("llama_tied", 1))],
)  # fmt: skip
def test_new_blocks_add_nothing_and_all_of_them_learns(name, blocks):
    made, plan = grown_blocks(name, blocks)
    same_shapes(made)
    logits, first, both = run(*made)
    np.testing.assert_allclose(logits, before(name)[0], atol=1e-5)
    new = {
        f"{stack}/{path}": layers.new for stack, layers in plan.items() for path in spec.stacks(made.model.specs)[stack]
    }
    ends = {f"{stack}/{path}" for stack in plan for path in depth.silent(spec.stacks(made.model.specs)[stack])}
    mapped = depth.moments(before(name)[1], plan)
    for path in ends:  # of the new layers alone; they have no counterpart
        mapped[path][list(new[path])] = first[path][list(new[path])]
    same_gradients(first, mapped)
    routed = [path for path in new if "experts" in path]  # an expert may have no token
    for path in new.keys() - set(routed):
        grads = first[path][list(new[path])]
        assert all(np.any(g) == (path in ends) for g in grads), f"{path}: the ends alone learn at once"
    moved = tree.map_named(lambda path, w: w - 0.1 * first[path], made.weights)
    second = {path: np.asarray(g) for path, g in tree.flatten(both(moved)[0]).items()}
    for path, flags in new.items():
        assert all(np.any(g) for g in second[path][list(flags)]), f"{path} does not learn"


def mapped_widths(name: str, made: Tiny, order: int) -> dict[str, np.ndarray]:
    """The averages of the small model's gradients, mapped; a table whose tied head has become another's is left out."""
    model = tiny(name).model
    old, averages = model.specs, {path: g**order for path, g in before(name)[1].items()}
    if "head" in made.model.specs and "head" not in old:
        old, _ = width.with_own_head(old, made.model.specs, {"embed": 0})
        del averages["embed"]
    return width.moments(old, made.model.specs, averages, (model.config.width, made.model.config.width), order)


def apart_in(name: str, sizes: dict[str, int], made: Tiny) -> frozenset[str]:
    """The keys and values whose copies serve unequal numbers of copies of the same queries."""
    c, new = tiny(name).model.config, made.model.config
    kv, new_kv = (getattr(x, "kv_heads", None) or x.heads for x in (c, new))
    source = width.head_sources(c.heads, kv, new.heads, new_kv).reshape(new_kv, -1)
    counts = np.stack([np.bincount(row, minlength=c.heads) for row in source])
    even = all((counts[i::kv] == counts[i]).all() for i in range(kv))
    flat = tree.flatten(made.model.specs, spec.is_spec)
    return frozenset() if even else frozenset(path for path, s in flat.items() if "kv" in s.axes)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", dict(width=16, ffn=17, heads=12, kv_heads=4)),
        *slow(
            ("gpt2", dict(width=24, heads=6, ffn=36)),
            ("llama", dict(heads=9, kv_heads=3, ffn=20)),
            ("llama", dict(kv_heads=4, ffn=13)),
            ("llama_tied", dict(width=16, heads=3, ffn=13)),
            ("gemma2", dict(heads=3, ffn=20)),
            ("olmo", dict(width=16, heads=4, kv_heads=2, ffn=13)),
            ("bert", dict(ffn=19)),
            ("smollm3", dict(ffn=15, heads=5)),
            ("modernbert", dict(width=16, heads=4, ffn=13)),
            ("t5", dict(width=16, heads=3, ffn=30)),
            ("mbart", dict(width=16, heads=4, ffn=16)),
            ("deepseek", dict(width=16, heads=5, ffn=18)),
        ),
    ],
)
def test_wider_models_compute_the_same_and_noise_trains_copies_apart(name, sizes):
    plain, noisy = widened(name, **sizes), widened(name, noise=0.5, **sizes)
    same_shapes(plain)
    logits, grads, both = run(*plain)
    np.testing.assert_allclose(logits, before(name)[0], atol=1e-5)
    assert all(np.any(g) for path, g in grads.items() if "experts" not in path)
    same_gradients(grads, mapped_widths(name, plain, 1), apart_in(name, sizes, plain))
    with jax.default_matmul_precision("highest"):
        apart, again = both(noisy.weights)
    np.testing.assert_allclose(np.asarray(again), before(name)[0], atol=2e-5)
    squares = mapped_widths(name, plain, 2)
    same_gradients({path: g**2 for path, g in grads.items()}, squares, apart_in(name, sizes, plain))
    up = next(path for path, s in tree.flatten(plain.model.specs, spec.is_spec).items()
              if s.axes == ("layers", "embed", "ffn"))  # fmt: skip
    n = tree.at(tiny(name).model.specs, up).shape[-1]
    assert tree.at(plain.model.specs, up).shape[-1] > n
    np.testing.assert_allclose(grads[up][..., n], grads[up][..., 0], atol=1e-6)
    assert np.abs(np.asarray(tree.at(apart, up))[..., n] - np.asarray(tree.at(apart, up))[..., 0]).max() > 1e-4


def test_a_dense_model_becomes_a_mixture_of_copies():
    model, weights = tiny("llama")
    name, fields = model.config.with_experts(Moe(experts=3, top_k=2, ffn=12))
    mixture = model_of(MODELS[name], MODELS[name].Config(**fields))
    made = Tiny(mixture, experts.upcycled(model.specs, mixture.specs, weights, jax.random.key(0)))
    same_shapes(made)
    logits, grads, _ = run(*made)
    np.testing.assert_allclose(logits, before("llama")[0], atol=1e-5)
    assert all(np.any(g) for g in grads.values())
    for path in ("gate", "up", "down"):  # of every layer's every expert: the router sends tokens to all of them
        assert grads[f"blocks/experts/{path}"].any((2, 3)).all()
    for refused in (dict(qkv_bias=True), dict(rotated=(True, False)), dict(mlp_bias=True), dict(qk_norm=True)):
        (field,) = refused
        with pytest.raises(ValueError, match=rf"experts: model\.{field} of this model has no place"):
            dataclasses.replace(model.config, **refused).with_experts(Moe())
    with pytest.raises(ValueError, match="experts: no family has this one's layers"):
        tiny("gpt2").model.config.with_experts(Moe())


@pytest.mark.parametrize("top_k", [2, 3])
def test_the_gradients_of_experts_are_shares_of_the_dense_one(top_k):
    """They add up to it; where all tokens go to all experts alike each has the same share."""
    model, weights = tiny("llama")
    name, fields = model.config.with_experts(Moe(experts=3, top_k=top_k, ffn=12, balance=0.0))
    mixture = model_of(MODELS[name], MODELS[name].Config(**fields))
    made = experts.upcycled(model.specs, mixture.specs, weights, jax.random.key(0))
    if top_k == 3:
        made = tree.map_named(lambda path, w: w * 0 if "router" in path else w, made)
    grads, old = run(mixture, made)[1], before("llama")[1]
    mapped = experts.moments(mixture.specs, old, top_k, 1)
    routed = {path for path in mapped if "experts" in path}
    assert len(routed) == 3 and set(grads) - set(mapped) == {"blocks/router"}
    same_gradients({path: grads[path].sum(1) for path in routed}, {path: mapped[path].sum(1) for path in routed})
    same_gradients(grads, mapped, frozenset(routed if top_k == 2 else ()))
    squares = experts.moments(mixture.specs, {path: g**2 for path, g in old.items()}, top_k, 2)
    same_gradients({path: g**2 for path, g in grads.items()}, squares, frozenset(routed if top_k == 2 else ()))
    for path in routed:
        share = 1 / 9 if top_k == 3 else 1 / 6  # a square of one half, of a third of two choices
        np.testing.assert_allclose(squares[path][:, 0], old[path.replace("/experts", "")] ** 2 * share, rtol=1e-6)


def test_averages_of_new_rows_are_zero():
    larger = tiny("llama").model.family.specs(dataclasses.replace(tiny("llama").model.config, vocab=14))
    made = vocabulary.moments(larger, before("llama")[1], {10: [1, 4], 12: []})
    for path in ("embed", "head"):
        np.testing.assert_array_equal(made[path][:10], before("llama")[1][path][:10])
        assert made[path].shape == (14, 8) and not made[path][10:].any()
    assert made["blocks/q"] is before("llama")[1]["blocks/q"]


def test_new_rows_are_means_of_old_ones():
    model, weights = tiny("llama")
    larger = model.family.specs(dataclasses.replace(model.config, vocab=14))
    made = vocabulary.with_rows(larger, weights, 10, {10: [1, 4], 12: []})
    for path in ("embed", "head"):
        new, old = made[path], weights[path]
        assert new.shape == (14, 8)
        np.testing.assert_array_equal(new[:10], old[:10])
        np.testing.assert_allclose(new[10], (old[1] + old[4]) / 2, rtol=1e-6)
        for row in (11, 12, 13):
            np.testing.assert_allclose(new[row], old[:10].mean(0), rtol=1e-5)
    assert made["blocks"]["q"] is weights["blocks"]["q"]


def test_a_stack_is_repeated_in_order():
    model, weights = tiny("smollm3")
    plan = depth.repetition(model.specs, 2)
    c = depth.config(model.config, model.specs, plan)
    assert (c.layers, c.rotated, c.windowed) == (4, (True, False), (False, True))
    made = depth.weights(model.specs, weights, plan)
    np.testing.assert_array_equal(made["blocks"]["o"], np.concatenate([weights["blocks"]["o"]] * 2))
    with pytest.raises(ValueError, match=r"stack: layers of different shapes .*dense and blocks"):
        depth.repetition(tiny("deepseek").model.specs, 2)


def test_copies_of_layers_are_of_the_same_kind():
    c = grown_blocks("smollm3", 1)[0].model.config
    assert (c.layers, c.rotated, c.windowed) == (3, (True, False, False), (False, True, True))
    c = grown_blocks("deepseek", 2)[0].model.config
    assert (c.layers, c.dense) == (6, 3)
    c = grown_blocks("t5", 1)[0].model.config
    assert (c.layers, c.decoder_layers) == (3, 2)


@pytest.mark.parametrize(
    ("name", "sizes", "says"),
    [
        ("llama", dict(width=12), "width 8 can't become 12: norms allow whole multiples"),
        ("llama", dict(ffn=5), r"blocks/down would shrink from 12 to 5"),
        ("llama_wide", dict(kv_heads=3), "blocks/o would lose units of its heads axis"),
        ("llama", dict(heads=2), "would shrink from 4 to 2"),
        ("llama", dict(head_width=8), "heads keep their width"),
        ("llama", dict(layers=4), "can't grow from 2 to 4 units along layers"),
        ("gpt2", dict(width=16), "heads keep their width; change heads and width together"),
        ("olmo", dict(heads=3, kv_heads=1), "would shrink"),
        ("olmo", dict(kv_heads=4, heads=8, width=8, vocab=12), "along vocab"),
    ],
)
def test_widths_that_can_not_grow_are_refused(name, sizes, says):
    with pytest.raises(ValueError, match=f"^widen: .*{says}"):
        widened(name, **sizes)


def test_norms_over_all_heads_need_whole_multiples():
    with pytest.raises(ValueError, match=r"widen: blocks/q_norm norms 2 units, so only whole multiples"):
        widened("olmo_grouped", heads=3)


def test_layers_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="blocks: 2 layers do not divide into 3 equal groups"):
        depth.expansion(tiny("llama").model.specs, 3)
    with pytest.raises(ValueError, match="model: this family doesn't say which of its weights are layers"):
        depth.config(tiny("llama").model.config, {}, {})
