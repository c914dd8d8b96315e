"""Architectures, one family a file. Each module has:

- `Config`: a frozen dataclass of shapes, with `vocab` and `positions` (longest sequence, or None for no limit).
- `specs(c)`: the weights as a tree of `Spec`; layers stacked under `blocks`.
- `hidden(c, specs, params, batch, *, shard, key=None) -> [B, T, D]`: `batch` is a dict (`tokens`, `segments`, `positions` …);
  `key` turns dropout on.
- `readout(c, specs, params, hidden, *, shard) -> losses.Readout`: what the vocabulary's logits are made of.
- `generates`: whether each position predicts the next.
- `attention_width(c)`: heads × head width × layers, which attention's FLOPs grow with.
"""

from types import ModuleType

from jaxlm.models import bert, gpt2, llama

MODELS: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "bert": bert}
