"""`Model` binds a family to its configuration, specs and layout."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.batch import COUNTED
from jaxlm.nn import layers
from jaxlm.nn.cache import Cache, in_few_bits
from jaxlm.nn.family import Family, ModelConfig
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout
from jaxlm.nn.taps import Taps


@dataclass(frozen=True)
class Model:
    """Holds a family with its configuration, specs and layout: what objectives call with `params` and a batch."""

    family: Family
    config: ModelConfig
    specs: Any
    shard: Layout
    adapter: Any = None
    """An `Adapted`: weights then become the leaves that do its work, whatever is called."""
    ids_in_use: int | None = None
    """How many rows of the vocabulary are tokens; the others pad it. None: all."""

    def bound(self, params: Any, key: jax.Array | None = None) -> Any:
        """Returns the weights as the family multiplies with them: with the adapter on them."""
        return params if self.adapter is None else self.adapter.bind(params, key)

    def forward(
        self, params: Any, batch: Mapping[str, Any], *, key: jax.Array | None = None, cache: Cache | None = None
    ) -> Output:
        """Computes the last layer's states of a batch, see `Family.forward`, with the adapter's part in them."""
        shard = self.shard if self.adapter is None else self.adapter.layout(self.shard)
        call = partial(self.family.forward, self.config, self.specs, shard=shard, cache=cache)
        if self.adapter is None:
            return call(params, batch, key=key)
        own, key = (None, None) if key is None else jax.random.split(key)
        out = call(self.bound(params, own), self.adapter.with_virtual_tokens(batch, cache, self.shard), key=key)
        return self.adapter.without_virtual_tokens(out, cache, self.shard)

    def readout(self, params: Any, x_BTD: jax.Array) -> Readout:
        """Returns what the logits of these states are made of."""
        made = self.family.readout(self.config, self.specs, self.bound(params), x_BTD, shard=self.shard)
        return replace(made, ids_in_use=self.ids_in_use)

    def pooled(self, params: Any, x_BTD: jax.Array) -> jax.Array:
        """Returns `[B, D]`, the pooler's summary of each row. ValueError: the model has no pooler."""
        if not self.config.pooler:
            raise ValueError("model.pooler: this model has none; set it to true, or choose an objective without it")
        return self.task_states(params, self.shard(x_BTD, "batch", None, None)[:, :1])[:, 0]

    def task_states(self, params: Any, x_BTD: jax.Array, seq: str | None = None) -> jax.Array:
        """Returns states as heads of tasks read them: through the model's task layer if it has one. `seq` is the
        logical axis of their positions."""
        if (layer := self.config.task_layer) is None:
            return x_BTD
        p = self.bound(params)
        y_BTD = layers.dense_layer(p, self.specs, layer.weight, layer.activation, x_BTD, self.shard, seq)
        return layers.layer_norm(y_BTD, p[layer.norm], p.get(f"{layer.norm}_bias"), layer.eps) if layer.norm else y_BTD

    def init_cache(self, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
        """Returns an empty cache for rows of `length`, and for the adapter's virtual tokens, in `dtype` unless
        `execution.cache` says fewer bits."""
        n = 0 if self.adapter is None or self.family.kind != "decoder" else self.adapter.num_virtual_tokens
        made = self.family.init_cache(self.config, rows, length + n, dtype, slack)
        kind = self.shard.execution.cache
        return made if kind == "dtype" else in_few_bits(made, kind)


@dataclass(frozen=True)
class SharingModel(Model):
    """Computes the last layer's states once where the same weights and batch are asked for several times while a
    program is made, as by a loss and by what compares two models. It is for models that draw nothing: with a key and
    without one their states are the same."""

    reads: frozenset[str] = frozenset()
    """The names at the top of the weights that `forward` reads; heads beside them may differ."""
    known: dict[tuple[int, ...], tuple[Any, Output]] = field(default_factory=dict, compare=False)

    def forward(
        self, params: Any, batch: Mapping[str, Any], *, key: jax.Array | None = None, cache: Cache | None = None
    ) -> Output:
        """Computes what `Model.forward` does, or returns what it computed of these very arrays."""
        place, arrays = self.place(params, batch)
        if cache is not None:
            return super().forward(params, batch, key=key, cache=cache)
        if place not in self.known:  # which also keeps the arrays, so that no other has their place
            self.known[place] = arrays, super().forward(params, batch)
        return self.known[place][1]

    def place(self, params: Any, batch: Mapping[str, Any]) -> tuple[tuple[int, ...], list[Any]]:
        """Returns what tells the weights and the batch of a pass from others, and these arrays."""
        read = {name: value for name, value in params.items() if name in self.reads}
        arrays = [*jax.tree.leaves(read), *(batch[name] for name in sorted(batch) if name not in COUNTED)]
        return tuple(map(id, arrays)), arrays


class Seen(NamedTuple):
    """A Seen holds what layers of a model did with a batch."""

    layers: list[dict[str, jax.Array]]
    """The wanted activations `[B, T, …]` of each layer, by their names in `Taps`."""
    segments_BT: jax.Array
    """The texts that the tokens belong to; 0: padding."""


@dataclass(frozen=True)
class TappedModel(SharingModel):
    """Keeps activations of layers beside the states, of the first pass over a batch, and computes the states of a batch
    once: a loss with dropout and what compares its predictions then see one pass. It is for one trace."""

    wanted: frozenset[str] = frozenset()
    """Names of activations (`Taps`); empty: none."""
    seen: list[Seen] = field(default_factory=list, compare=False)
    """One for each pass."""

    def forward(
        self, params: Any, batch: Mapping[str, Any], *, key: jax.Array | None = None, cache: Cache | None = None
    ) -> Output:
        """Computes what `Model.forward` does, or returns what it computed of these very arrays, with or without a
        key."""
        place, arrays = self.place(params, batch)
        if cache is None and place in self.known:
            return self.known[place][1]
        taps = Taps(self.wanted) if self.wanted and cache is None else None
        plain = Model(self.family, self.config, self.specs, replace(self.shard, taps=taps), self.adapter)
        out = plain.forward(params, batch, key=key, cache=cache)
        if cache is None:
            self.known[place] = arrays, out
        if taps is not None:
            n = 0 if self.adapter is None else self.adapter.num_virtual_tokens
            tokens_BT = batch["tokens"]
            each = [{name: self._own(x, n) for name, x in layer.items()} for layer in taps.layers]
            self.seen.append(Seen(each, batch.get("segments", jnp.ones_like(tokens_BT))))
        return out

    def _own(self, x: jax.Array, virtual: int) -> jax.Array:
        """Returns an activation without those of virtual tokens, which stand before a row's own."""
        return self.shard(x, "batch", *[None] * (x.ndim - 1))[:, virtual:] if virtual else x
