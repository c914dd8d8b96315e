"""Our models as Flax modules: the same parameters, logits and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm.assembly.as_flax import as_linen, as_nnx
from jaxlm.core import config, spec, tree
from jaxlm.models import MODELS, bert, llama, t5
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.weights.adapters import METHODS, adapted

B, T, V = 2, 8, 64
CONFIGS = {
    "llama": llama.Config(vocab=V, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=24, dropout=0.1),
    "t5": t5.Config(vocab=V, layers=1, width=16, heads=2, head_width=8, ffn=24),
}


def model_of(c) -> Model:
    family = MODELS.of(c)
    return Model(family, c, family.specs(c), Layout(execution=config.Execution(dtype="float32")))


def weights(m: Model):
    return jax.jit(lambda key: spec.init(m.specs, key))(jax.random.key(0))


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_logits_and_gradients_are_ours(name):
    c = CONFIGS[name]
    m, rng = model_of(c), np.random.default_rng(0)
    params, tokens, targets = weights(m), *(rng.integers(0, V, (B, T)).astype(np.int32) for _ in range(2))
    positions = np.tile(np.array([0, 1, 2, 3, 0, 1, 2, 3], np.int32), (B, 1))
    segments = np.tile(np.repeat(np.array([1, 2], np.int32), 4), (B, 1))
    more = {"source": targets} if name == "t5" else {}
    places = dict(source_positions=np.tile(np.arange(T, dtype=np.int32), (B, 1))) if name == "t5" else {}
    batch = dict(tokens=tokens, positions=positions, segments=segments, **more, **places)

    def loss(z):
        return optax.softmax_cross_entropy_with_integer_labels(z, targets).mean(), z

    def ours(p):
        return loss(losses.logits(m.readout(p, m.forward(p, batch).x_BTD), m.shard))

    linen, module = as_linen(c), as_nnx(m, params)
    (_, z), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    apply = lambda p: loss(linen.apply({"params": p}, tokens, positions, segments, **more))  # noqa: E731
    (_, linen_z), linen_grads = jax.jit(jax.value_and_grad(apply, has_aux=True))(params)
    call = lambda module: loss(module(tokens, positions, segments, **more))  # noqa: E731
    (_, nnx_z), nnx_grads = nnx.jit(nnx.value_and_grad(call, has_aux=True))(module)
    for got_z, got in ((linen_z, linen_grads), (nnx_z, nnx.to_pure_dict(nnx_grads))):
        np.testing.assert_allclose(got_z, z, rtol=1e-6, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, grads)


@pytest.mark.slow
def test_fresh_weights_have_our_names_and_dropout_is_flax_s():
    c = CONFIGS["llama"]
    tokens = np.arange(B * T, dtype=np.int32).reshape(B, T)
    linen = as_linen(c)
    variables = jax.jit(linen.init)(jax.random.key(0), tokens)
    expected = jax.tree.map(lambda s: s.shape, model_of(c).specs, is_leaf=spec.is_spec)
    assert jax.tree.map(jnp.shape, variables["params"]) == expected
    module = as_nnx(c, rngs=nnx.Rngs(0))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(module, nnx.Param))) == expected

    draw = jax.jit(lambda key: linen.apply(variables, tokens, deterministic=False, rngs={"dropout": key}))
    one, again, other = draw(jax.random.key(1)), draw(jax.random.key(1)), draw(jax.random.key(2))
    assert np.array_equal(one, again) and not np.allclose(one, other)
    with pytest.raises(ValueError, match="rngs: dropout needs them"):
        module(tokens, deterministic=False)
    assert module(tokens, deterministic=False, rngs=nnx.Rngs(1)).shape == (B, T, V)
    assert module.states(tokens).x_BTD.shape == (B, T, 16)


def test_a_model_without_a_head_gives_states_and_what_does_not_fit_is_told():
    c = bert.Config(vocab=V, layers=1, width=16, heads=2, ffn=24, positions=T, head=False)
    tokens = np.zeros((B, T), np.int32)
    assert jax.eval_shape(as_nnx(c, rngs=nnx.Rngs(0)), tokens).shape == (B, T, 16)
    with pytest.raises(ValueError, match="as_nnx: params: there are none"):
        as_nnx(c)
    with pytest.raises(ValueError, match="sauce: no array of a batch"):
        jax.eval_shape(lambda: as_linen(c).init(jax.random.key(0), tokens, sauce=tokens))
    for other, more in ((c, {"source": tokens}), (CONFIGS["t5"], {})):
        with pytest.raises(ValueError, match="source: an encoder-decoder needs it"):
            jax.eval_shape(lambda other=other, more=more: as_linen(other).init(jax.random.key(0), tokens, **more))
    m = model_of(CONFIGS["llama"])
    adapter = adapted.Adapted(METHODS["lora"].Config(), m.family, m.config)
    with pytest.raises(ValueError, match="model: it has an adapter"):
        as_linen(dataclasses.replace(m, adapter=adapter))
    half = as_nnx(m, weights(m), execution=config.Execution(dtype="bfloat16"))
    assert jax.eval_shape(lambda: half.states(tokens)).x_BTD.dtype == jnp.bfloat16
    assert tree.flatten(nnx.to_pure_dict(nnx.state(half, nnx.Param)))["embed"].dtype == jnp.float32
