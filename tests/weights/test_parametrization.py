"""A model of the base's own sizes is as without a transfer; wider and deeper ones compute and are trained as μP's and
CompleteP's formulas say, though no factor stands in a forward pass."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.assembly import program
from jaxlm.core import config, spec, tree
from jaxlm.core.spec import Constant, EachLayer, FanIn, Normal, Spec, fan_in, is_spec, normal, stacked
from jaxlm.core.transfer import Transfer
from jaxlm.data.tokenizer import Bytes
from jaxlm.models import MODELS, deepseek, gemma, gpt2, llama, mixtral, t5
from jaxlm.nn import attention_layers, losses
from jaxlm.nn.layout import Layout
from jaxlm.nn.taps import Taps
from jaxlm.objectives import causal
from jaxlm.training import optimizers, rate_scales
from jaxlm.training.rate_scales import Scale
from jaxlm.weights import parametrization

KNOWN = [name for name, family in MODELS.items() if family.kind != "encoder_decoder" and name != "gemma"]
TINY = llama.Config(vocab=264, layers=2, width=64, heads=2, kv_heads=1, head_width=32, ffn=64, positions=64)


def head_width(family: Any, c: Any) -> int:
    return next(s.shape[-1] for s in tree.flatten(family.specs(c), is_spec).values() if s.scores)


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_of_the_bases_sizes_is_as_without_a_transfer(name: str) -> None:
    family, c = MODELS[name], MODELS[name].Config()
    layers = c.layers if family.kind == "decoder" else None
    same = Transfer("mup", c.width, layers, base_head_width=head_width(family, c))
    assert parametrization.scaled(same, family, c) == (family.specs(c), {})
    assert parametrization.scaled(Transfer(), family, c) == (family.specs(c), {})


@pytest.mark.parametrize("name", KNOWN)
def test_every_family_scales_by_roles_alone(name: str) -> None:
    """Twice as wide: hidden matrices have half of Adam's rate, heads half of their product, and nothing else changes
    but Adam's epsilon."""
    family, c = MODELS[name], MODELS[name].Config()
    transfer = Transfer("mup", c.width // 2, base_head_width=head_width(family, c))
    specs, scales = parametrization.scaled(transfer, family, c)
    flat = tree.flatten(specs, is_spec)
    for path, s in flat.items():
        reads_out = s.role in ("head", "router") or (c.tied and s.before_head)
        hidden = s.is_matrix and s.role in ("matrix", "absorbed")
        muon = 2**0.5 if s.role == "router" else 1.0
        assert scales[path] == Scale(0.5 if reads_out else 1.0, 0.5 if hidden else 1.0, muon, 0.5), path
    assert any(scale.fold == 0.5 for scale in scales.values())


def deviation(s: Spec) -> float:
    """The deviation that the initializer of a matrix states."""
    each = isinstance(s.init, EachLayer)
    one, shape = (s.init.one, s.shape[1:]) if isinstance(s.init, EachLayer) else (s.init, s.shape)
    assert isinstance(one, FanIn | Normal) and each == ("layers" in s.axes)
    return one.std if isinstance(one, Normal) else one.scale / math.prod(shape[i] for i in one.axes) ** 0.5


def test_initial_weights_have_the_variances_of_the_formulas() -> None:
    """Four times the base's width, and twice its depth: hidden weights have its variance over m, those that write to
    the residual stream are folded by 1/d, the head by 1/m, queries by the root of what heads are too wide."""
    sizes = dict(vocab=264, layers=1, width=16, heads=2, positions=64)
    for family, base in (
        (llama, llama.Config(**sizes, kv_heads=2, head_width=8, ffn=16)), (gpt2, gpt2.Config(**sizes, tied=False))
    ):  # fmt: skip
        c = base.at_width(64).at_depth(2)
        before = {path: deviation(s) for path, s in tree.flatten(family.specs(base), is_spec).items() if s.is_matrix}
        specs, _ = parametrization.scaled(Transfer("mup", 16, 1, base_head_width=2), family, c)
        now = tree.flatten(specs, is_spec)
        factors = {"embed": 1.0, "head": 1 / 4, "blocks/q": 0.5 * 0.5, "blocks/o": 0.5 / 2, "blocks/down": 0.5 / 2,
                   "position": 1.0}  # fmt: skip
        for path, std in before.items():
            np.testing.assert_allclose(deviation(now[path]), std * factors.get(path, 0.5), rtol=1e-6, err_msg=path)
    tied, _ = parametrization.scaled(Transfer("mup", 16, base_head_width=8), gpt2, dataclasses.replace(c, tied=True))
    assert tied["norm"].init == Constant(0.25) and tied["embed"].init == Normal(0.02)
    drawn = spec.init({"x": tied["blocks"]["up"]}, jax.random.key(0))["x"]
    np.testing.assert_allclose(np.std(drawn), 0.01, rtol=0.05)


FOLDED = {
    "embed": Scale(2.0, 1.0, 1.0, 0.25),
    "blocks": {"up": Scale(1.0, 0.25, 1.0, 0.125), "o": Scale(0.5, 0.25, 1.0, 0.125), 
               "norm": Scale(0.5, 1.0, 1.0, 0.125)},
    "head": Scale(0.25, 1.0, 1.0, 0.25),
}  # fmt: skip
SPECS = {
    "embed": spec.table(8, 8, normal(1)),
    "blocks": stacked(2, {
        "up": Spec((8, 8), ("embed", "ffn"), fan_in(0)), "o": Spec((8, 8), ("ffn", "embed"), fan_in(0)),
        "norm": spec.norm(8),
    }),
    "head": spec.head(8, 8, fan_in(1)),
}  # fmt: skip


def drawn(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), SPECS, is_leaf=is_spec)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_folded_weights_are_trained_as_the_formulas_weights(name: str) -> None:
    """Beside weights w whose loss has the factors in it, each with its own rate, epsilon and decay."""
    c = config.Optim(name=name, lr=0.02, muon_lr=0.05, schedule="constant", warmup=0, eps=1e-2, weight_decay=0.3)
    scales = tree.flatten(FOLDED)
    target = drawn(1)
    loss = lambda w: sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(jnp.sin(a) * b), w, target)))  # noqa: E731
    fold = lambda w: tree.map_named(lambda path, x: scales[path].fold * x, w)  # noqa: E731

    ours = optimizers.make(c, 10, SPECS, scales=scales)
    folded = fold(drawn(0))
    state = ours.tx.init(folded)
    plain = drawn(0)  # the formula's
    muon = {path for path in scales if ours.groups[path].startswith("muon")}
    rate = {path: s.muon * c.muon_lr if path in muon else s.adam * c.lr for path, s in scales.items()}
    direction = dataclasses.replace(c, weight_decay=0.0, lr=1.0, muon_lr=1.0)
    single = lambda path, t: tree.partition(t, lambda p: p == path)[0]  # noqa: E731
    alone = {
        path: optimizers.make(
            dataclasses.replace(direction, eps=c.eps * s.eps), 10, SPECS, trainable=lambda p, path=path: p == path
        ).tx
        for path, s in scales.items()
    }
    states = {path: tx.init(single(path, plain)) for path, tx in alone.items()}
    decayed = {path: c.weight_decay * (c.muon_lr if path in muon else c.lr) for path in scales if "norm" not in path}

    @jax.jit
    def update(folded: Any, state: Any, plain: Any, states: Any) -> Any:
        grads = ours.moved(jax.grad(loss)(folded))
        updates, state = ours.tx.update(grads, state, folded)
        gradients, states = jax.grad(lambda w: loss(fold(w)))(plain), dict(states)
        moves = {}
        for path, tx in alone.items():
            moved, states[path] = tx.update(single(path, gradients), states[path], single(path, plain))
            moves[path] = rate[path] * tree.at(moved, path) - decayed.get(path, 0.0) * tree.at(plain, path)
        return (
            optax.apply_updates(folded, updates), state, tree.map_named(lambda path, w: w + moves[path], plain), states
        )  # fmt: skip

    for _ in range(3):
        folded, state, plain, states = update(folded, state, plain, states)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), folded, fold(plain))


def activations(family: Any, c: Any, params: Any) -> tuple[Any, Any]:
    """(logits, what the first layer's attention adds)."""
    specs, taps = family.specs(c), Taps(frozenset({"o"}))
    shard = dataclasses.replace(Layout(execution=config.Execution(dtype="float32")), taps=taps)
    tokens = jnp.asarray(np.arange(24).reshape(2, 12) * 7 % 264)
    batch = dict(tokens=tokens, positions=jnp.broadcast_to(jnp.arange(12), (2, 12)))
    out = family.forward(c, specs, params, batch, shard=shard)
    return losses.logits(family.readout(c, specs, params, out.x_BTD, shard=shard), shard), taps.layers[0]["o"]


@pytest.mark.parametrize("family, c", [
    (llama, dataclasses.replace(TINY, qk_norm=True, tied=True)),
    (gpt2, gpt2.Config(vocab=264, layers=2, width=64, heads=2, positions=64)),
])  # fmt: skip
def test_a_model_with_folded_weights_computes_what_the_formulas_do(family: Any, c: Any, monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) / 4, jnp.float32), family.specs(c),
                           is_leaf=is_spec)  # fmt: skip
    transfer = Transfer("mup", base_width=16, base_head_width=8, input_factor=2.0, output_factor=3.0)

    def folded(transfer: Transfer) -> Any:
        scales = parametrization.scaled(transfer, family, c)[1]
        return tree.map_named(lambda path, w: scales[path].fold * w, weights)

    ours, _ = activations(family, c, folded(transfer))
    _, deep = activations(family, c, folded(dataclasses.replace(transfer, base_layers=1)))
    plain = attention_layers.attend
    scale = 8**0.5 / 32  # 1/√8 at the base's width of heads, and over the width itself from there
    monkeypatch.setattr(attention_layers, "attend", lambda *a, **kw: plain(*a, **kw | {"scale": scale}))
    tables = {path for path, s in tree.flatten(family.specs(c), is_spec).items() if s.role == "table"}
    formula = tree.map_named(lambda path, w: 2.0 * w if path in tables else w, weights)
    expected, added = activations(family, c, formula)
    expected /= 2.0 if c.tied else 1.0  # the table's factor is one of embeddings alone
    np.testing.assert_allclose(ours, 3.0 / 4 * expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(deep, added / 2, rtol=2e-4, atol=2e-5)


def test_depth_is_folded_into_what_writes_to_the_residual_stream() -> None:
    """Of OLMo 2 into the norms after the halves, of others into the last matrices and their biases."""
    for family, c, writers in (
        (llama, dataclasses.replace(TINY, layers=8, o_bias=True, qkv_bias=True), {"o", "o_bias", "down"}),
        (mixtral, mixtral.Config(), {"o", "experts/down"}),
        (deepseek, deepseek.Config(dense=1), {"o", "experts/down", "shared/down", "down"}),
        (MODELS["olmo"], MODELS["olmo"].Config(), {"norm1", "norm2"}),
    ):
        base = dict(base_width=c.width, base_head_width=head_width(family, c))
        for alpha in (1.0, 0.5):
            transfer = Transfer("mup", base_layers=c.layers // 4, depth_alpha=alpha, **base)
            _, scales = parametrization.scaled(transfer, family, c)
            assert {path.split("/", 1)[1] for path, s in scales.items() if s.fold == 4**-alpha} == writers
            layers = [s for path, s in scales.items() if path.startswith(("blocks/", "dense/"))]
            assert {(s.adam, s.muon, s.eps) for s in layers} == {(4 ** (alpha - 1), 4 ** (alpha - 1), 4**-alpha)}


REFUSED = {
    "no base": (llama, TINY, Transfer("mup"), r"transfer\.base_width: .*set it \(this one's model\.width is 64\)"),
    "an encoder-decoder": (t5, t5.Config(), Transfer("mup", 64), r"transfer\.method: .*decoders and encoders"),
    "a table by the width": (gemma, gemma.Config(), Transfer("mup", 64), r"transfer\.method: embed .*law of its own"),
    "the depth of an encoder": (
        MODELS["bert"],
        MODELS["bert"].Config(),
        Transfer("mup", 64, 2),
        r"base_layers: only",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_in_one_line(name: str) -> None:
    family, c, transfer, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        parametrization.scaled(transfer, family, c)
    assert "\n" not in str(caught.value)


def test_other_sizes_of_a_config_grow_with_its_width() -> None:
    c = mixtral.Config(width=64, heads=2, kv_heads=1, moe=dataclasses.replace(mixtral.Config().moe, ffn=48, shared=0))
    wide = c.at_width(256)
    assert (wide.width, wide.heads, wide.kv_heads, wide.head_width, wide.moe.ffn) == (256, 8, 4, c.head_width, 192)
    with pytest.raises(ValueError, match=r"model\.heads: 8 at model\.width 256 would be no whole number at 48; choose"):
        wide.at_width(48)
    assert deepseek.Config(width=64).at_width(128).latent == 2 * deepseek.Config().latent


def test_a_run_of_the_bases_sizes_is_the_same_program() -> None:
    """Bit for bit, since compiler and numbers are the same."""

    def lowered(transfer: Transfer) -> tuple[str, str]:
        train = config.Train(steps=5, batch_size=8, seq_len=16)
        run = config.Run("r", TINY, causal.Config(), train=train, optim=config.Optim(warmup=1), transfer=transfer)
        p = program.program(run, Bytes())
        names = ("tokens", "positions", "segments", "targets")
        batch = {name: jax.ShapeDtypeStruct((1, 8, 16), jnp.int32) for name in names}
        batch["weights"] = jax.ShapeDtypeStruct((1, 8, 16), jnp.float32)
        step = p.train_step().lower(p.abstract_state(), batch).as_text()
        return jax.jit(p._fresh).lower(jax.random.key(0), {}).as_text(), step

    assert lowered(Transfer()) == lowered(Transfer("mup", 64, 2, base_head_width=32))


def test_rates_are_told_by_group() -> None:
    specs, scales = parametrization.scaled(Transfer("mup", 32, base_head_width=32), llama, TINY)
    groups = optimizers.make(config.Optim(name="muon", warmup=1), 10, specs, scales=scales).groups
    assert groups["blocks/up"] == "muon, decay 0.1" and groups["head"] == "adamw, decay 0.1, rate × 0.5"
    assert groups == {path: g for path, g in groups.items() if "rate" not in g} | {"head": groups["head"]}
    with pytest.raises(ValueError, match=r"optim\.name: .* rates of lion .*; choose adamw or muon"):
        optimizers.make(config.Optim(name="lion"), 100, specs, scales=scales)
    assert rate_scales.factor(scales, "blocks/up", lambda s: s.adam) == 0.5
