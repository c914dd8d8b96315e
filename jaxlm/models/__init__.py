"""Architectures, one family a file. Each module has:

- `Config`: a frozen dataclass of shapes, with `vocab` and `positions` (longest sequence, or None for no limit).
- `specs(c)`: the weights as a tree of `Spec`; layers stacked under `blocks`.
- `forward(c, specs, params, batch, *, shard, key=None, cache=None) -> layers.Output`: `batch` is a dict (`tokens`,
  `segments`, `positions` …; an encoder-decoder's other side in `source`, `source_segments`, `source_positions`);
  `key` turns dropout on; with a `cache` the tokens are read after those it remembers.
- `readout(c, specs, params, hidden, *, shard) -> losses.Readout`: what the vocabulary's logits are made of.
- `attention_width(c)`: layers × heads × head width, which attention's FLOPs grow with.
- `kind`: `decoder`, `encoder` or `encoder_decoder`. `generates`: whether each position predicts the next; what
  generates has `init_cache(c, rows, length, dtype, slack=0) -> attention.Cache`.
- For published files: `MODEL_TYPES` (what their config.json calls it), `from_hf(values) -> Config`,
  `to_hf(c) -> values`, `names(c) -> {our path: names.Name}`; where there are such, `IGNORED` (patterns of tensors that
  say nothing), `PREFIX` (what files of the bare model leave out; several: any of them) and
  `settle(c, tensor names) -> Config` (heads that files have or lack, whatever their config.json says).
"""

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax

from jaxlm.attention import Cache
from jaxlm.layers import Output
from jaxlm.losses import Readout
from jaxlm.models import bart, bert, deepseek, gemma, gpt2, gpt_oss, llama, mixtral, modernbert, olmo, t5
from jaxlm.sharding import Layout

MODELS: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "llama": llama,
    "gemma": gemma,
    "olmo": olmo,
    "mixtral": mixtral,
    "deepseek": deepseek,
    "gpt_oss": gpt_oss,
    "bert": bert,
    "modernbert": modernbert,
    "t5": t5,
    "bart": bart,
}


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

    def forward(self, params: Any, batch: dict, *, key: jax.Array | None = None, cache: Cache | None = None) -> Output:
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
