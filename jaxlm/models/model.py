"""A model family bound to its configuration, specs and layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax

from jaxlm.nn.cache import Cache
from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout


@dataclass(frozen=True)
class Model:
    """A family with its configuration, specs and layout filled in: what objectives call with `params` and a batch."""

    family: ModuleType
    config: Any
    specs: Any
    shard: Layout
    adapter: Any = None
    """A `peft.Adapted`: weights then become the leaves that do its work, whatever is called."""

    def bound(self, params: Any, key: jax.Array | None = None) -> Any:
        return params if self.adapter is None else self.adapter.bind(params, key)

    def forward(
        self, params: Any, batch: Mapping[str, Any], *, key: jax.Array | None = None, cache: Cache | None = None
    ) -> Output:
        shard = self.shard if self.adapter is None else self.adapter.layout(self.shard)
        call = partial(self.family.forward, self.config, self.specs, shard=shard, cache=cache)
        if cache is None:
            call = partial(self.family.forward, self.config, self.specs, shard=shard)
        if self.adapter is None:
            return call(params, batch, key=key)
        own, key = (None, None) if key is None else jax.random.split(key)
        out = call(self.bound(params, own), self.adapter.read(batch, cache, self.shard), key=key)
        return self.adapter.cut(out, cache, self.shard)

    def readout(self, params: Any, x_BTD: jax.Array) -> Readout:
        return self.family.readout(self.config, self.specs, self.bound(params), x_BTD, shard=self.shard)

    def pooled(self, params: Any, x_BTD: jax.Array) -> jax.Array:
        return self.family.pooled(self.config, self.specs, self.bound(params), x_BTD, shard=self.shard)

    def init_cache(self, rows: int, length: int, dtype: Any, slack: int = 0) -> Cache:
        places = 0 if self.adapter is None or self.family.kind != "decoder" else self.adapter.places
        return self.family.init_cache(self.config, rows, length + places, dtype, slack)
