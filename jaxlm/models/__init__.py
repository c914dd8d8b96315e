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

from typing import Any

from jaxlm.core.registry import Table
from jaxlm.models import bart, bert, deepseek, gemma, gpt2, gpt_oss, llama, mixtral, modernbert, olmo, t5

MODELS: Table[Any] = Table(
    "model",
    {
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
    },
)
