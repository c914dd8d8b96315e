"""Settings of adapters in `config.json` as they were written when one class of fields served all methods."""

import dataclasses
from typing import Any

from jaxlm.weights.adapters import METHODS

FIELDS = (
    "method", "base", "targets", "rank", "alpha", "rank_stabilized", "dropout", "b_lr", "target_rank", "warmup",
    "settle", "orthogonal", "reduction", "tokens", "text", "hidden",
)  # fmt: skip
RENAMED = {"settle": "final_tuning"}


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a `config.json` in which the adapter has a family and the fields of its method alone.

    Fields that only other methods read are dropped, whatever they were. What was never a field stays, to be refused.
    """
    adapter = values.get("adapter")
    if not isinstance(adapter, dict) or "method" not in adapter:
        return values
    name = adapter["method"] or "none"
    if name not in METHODS:  # refused where families are looked up
        return values | {"adapter": {"family": name}}
    known = {f.name for f in dataclasses.fields(METHODS[name].Config)}
    fields = {RENAMED.get(key, key): value for key, value in adapter.items() if key not in FIELDS or
              RENAMED.get(key, key) in known}  # fmt: skip
    return values | {"adapter": {"family": name} | fields}
