"""Our models as Flax modules: `as_linen` and `as_nnx` give any of them to code that is written in Flax.

Their parameters are ours, by the same nested names, and so are their logits and gradients. On a mesh they need one of
our axes (`runtime.mesh.make_mesh`); without one nothing is annotated.

B batch, T position, S source position, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import unfreeze

from jaxlm.core import config, spec
from jaxlm.core.batch import Batch
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.family import ModelConfig
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout


def as_linen(model: Model | ModelConfig, execution: config.Execution | None = None) -> linen.Module:
    """Returns a linen module that computes a model's logits.

    `module.init(key, tokens)["params"]` are fresh weights in our tree, and `module.apply({"params": ours}, tokens_BT,
    positions_BT, segments_BT)` gives float32 logits `[B, T, V]`, or states where the model has no head. Further arrays
    of a batch go by name (`source=` for an encoder-decoder, `types=`). `deterministic=False` turns dropout on, which
    draws from the stream `dropout`. The method `states` gives the whole `Output`, with a router's auxiliary loss.

    `model`: a `Model`, or the config of a registered family. `execution`: how it is computed; default: the model's own,
    of a config float32. ValueError: the model has an adapter; merge it first.
    """
    return _Linen(_Bound(_bind(model, execution)))


def as_nnx(
    model: Model | ModelConfig,
    params: Any = None,
    *,
    rngs: nnx.Rngs | None = None,
    execution: config.Execution | None = None,
) -> nnx.Module:
    """Returns an nnx module that computes a model's logits; see `as_linen` for its arguments.

    Its state is our tree: `nnx.state(module, nnx.Param)` has the same nested names. Weights are `params`, or fresh ones
    drawn from `rngs`. Dropout draws from the stream `dropout` of the `rngs` that are given to a call. ValueError: there
    are neither `params` nor `rngs`.
    """
    bound = _bind(model, execution)
    if params is None:
        if rngs is None:
            raise ValueError("as_nnx: params: there are none, and no rngs to draw them from; give one of the two")
        params = spec.init(bound.specs, rngs.params())
    return _Nnx(_Bound(bound), params)


class _Bound:
    """Holds a model as one value, as which Flax compares modules."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def states(self, params: Any, tokens_BT: Any, positions_BT: Any, segments_BT: Any, key: Any, more: dict) -> Output:
        """Runs the model. ValueError: an array that no batch has, or none of what an encoder reads."""
        if unknown := more.keys() - Batch.__annotations__.keys():
            raise ValueError(f"{min(unknown)}: no array of a batch; there are {', '.join(Batch.__annotations__)}")
        seq2seq = self.model.family.kind == "encoder_decoder"
        if seq2seq != ("source" in more):
            raise ValueError("source: an encoder-decoder needs it, and no other model takes it")
        batch = dict(more, tokens=tokens_BT, positions=positions_BT, segments=segments_BT)
        for tokens, positions in (("tokens", "positions"), *([("source", "source_positions")] if seq2seq else [])):
            if batch.get(positions) is None:
                batch[positions] = jnp.broadcast_to(jnp.arange(batch[tokens].shape[1]), batch[tokens].shape)
        return self.model.forward(params, {name: x for name, x in batch.items() if x is not None}, key=key)

    def logits(self, params: Any, out: Output) -> jax.Array:
        """Returns the logits of these states, or the states of a model without a head."""
        if not self.model.config.head:
            return out.x_BTD
        return losses.logits(self.model.readout(params, out.x_BTD), self.model.shard)


def _bind(model: Model | ModelConfig, execution: config.Execution | None) -> Model:
    if isinstance(model, ModelConfig):
        family = MODELS.of(model)
        layout = Layout(execution=execution or config.Execution(dtype="float32"))
        return Model(family, model, family.specs(model), layout)
    if model.adapter is not None:
        raise ValueError("model: it has an adapter, whose weights stand apart; merge it into the model's first")
    if execution is None:
        return model
    return dataclasses.replace(model, shard=dataclasses.replace(model.shard, execution=execution))


class _Linen(linen.Module):
    bound: _Bound

    def setup(self) -> None:
        specs = self.bound.model.specs
        self.weights = {name: self.param(name, self._init(name, specs[name])) for name in specs}

    def _init(self, name: str, specs: Any) -> Any:
        return lambda key: spec.init({name: specs}, key)[name]

    def __call__(
        self, tokens: Any, positions: Any = None, segments: Any = None, *, deterministic: bool = True, **more: Any
    ) -> jax.Array:
        out = self.states(tokens, positions, segments, deterministic=deterministic, **more)
        return self.bound.logits(unfreeze(self.weights), out)

    def states(
        self, tokens: Any, positions: Any = None, segments: Any = None, *, deterministic: bool = True, **more: Any
    ) -> Output:
        key = None if deterministic else self.make_rng("dropout")
        return self.bound.states(unfreeze(self.weights), tokens, positions, segments, key, more)


class _Nnx(nnx.Module):
    def __init__(self, bound: _Bound, params: Any) -> None:
        self._bound = bound
        for name in bound.model.specs:
            setattr(self, name, _variables(params[name]))

    def _weights(self) -> dict[str, Any]:
        return {name: _values(getattr(self, name), s) for name, s in self._bound.model.specs.items()}

    def __call__(
        self,
        tokens: Any,
        positions: Any = None,
        segments: Any = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        **more: Any,
    ) -> jax.Array:
        out = self.states(tokens, positions, segments, deterministic=deterministic, rngs=rngs, **more)
        return self._bound.logits(self._weights(), out)

    def states(
        self,
        tokens: Any,
        positions: Any = None,
        segments: Any = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
        **more: Any,
    ) -> Output:
        if not deterministic and rngs is None:
            raise ValueError("rngs: dropout needs them; give rngs, or leave deterministic at True")
        key = None if deterministic or rngs is None else rngs.dropout()
        return self._bound.states(self._weights(), tokens, positions, segments, key, more)


def _variables(weights: Any) -> Any:
    """Returns weights as parameters, in the same nested names."""
    if isinstance(weights, dict):
        return nnx.Dict({name: _variables(w) for name, w in weights.items()})
    return nnx.Param(weights)


def _values(variables: Any, specs: Any) -> Any:
    """Returns the weights that parameters hold."""
    if isinstance(specs, dict):
        return {name: _values(variables[name], s) for name, s in specs.items()}
    return variables.get_value()
