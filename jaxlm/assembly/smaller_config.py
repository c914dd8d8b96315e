"""Makes the config of a smaller model: of sizes that are asked for, or of a share of the layers' parameters."""

import dataclasses
from typing import Any

from jaxlm.assembly.open_model import Pretrained
from jaxlm.core import config_io
from jaxlm.core.shrinking import Shrinking
from jaxlm.weights.shrink import choice, units

NAMES = ("heads", "kv_heads", "ffn", "experts", "width", "layers", "decoder_layers")


def smaller(p: Pretrained, s: Shrinking) -> Any:
    """Returns the config of the smaller model, layers included. ValueError: it can't have these sizes."""
    c: Any = p.model.config
    asked = {name: getattr(s, name) for name in NAMES if getattr(s, name) is not None}
    if bool(asked) == bool(s.share):
        given = " and ".join(["share", *asked]) if asked else "nothing"
        raise ValueError(f"sizes: give {', '.join(NAMES)} (some of them) or share alone, not {given}")
    names = {f.name for f in dataclasses.fields(c)}
    if s.share:
        asked = _shares(p, s.share, names)
    for name, size in asked.items():
        now = size_of(c, name)
        if now is None:
            raise ValueError(f"{name}: this model has none; leave it out")
        if size > now:
            raise ValueError(f"{name}: {size} are more than the model's {now}; a model only shrinks here")
    changes = {name: size for name, size in asked.items() if name not in ("experts", "layers")}
    if "kv_heads" in names and "heads" in asked:
        changes.setdefault("kv_heads", choice.kv_heads(c.heads, c.kv_heads, asked["heads"]))
    if "kv_heads" in asked and "heads" not in asked:
        changes["heads"] = c.heads // c.kv_heads * asked["kv_heads"]
    if "ffn" in names and c.ffn is None and "ffn" not in changes:
        changes["ffn"] = 4 * c.width
    if "decoder_layers" in names and c.decoder_layers is None and "layers" in asked:
        changes.setdefault("decoder_layers", c.layers)
    smaller = config_io.changed(c, changes, "model.")
    if "experts" in asked:
        if c.moe.groups > 1:
            raise ValueError("experts: this model chooses among groups of experts, which must stay equal; keep them")
        smaller = dataclasses.replace(smaller, moe=dataclasses.replace(c.moe, experts=asked["experts"]))
    if "layers" in asked:  # the patterns of the layers follow when it is known which ones go
        smaller = dataclasses.replace(smaller, layers=asked["layers"])
    if smaller == c:
        raise ValueError("sizes: the model would stay as it is; give smaller ones")
    p.model.family.specs(smaller)  # refuses sizes that don't fit each other
    return smaller


def size_of(c: Any, name: str) -> int | None:
    """Returns a size of a config, also where it follows from others; None: there is none."""
    if name == "experts":
        return None if c.moe is None else int(c.moe.experts)
    if name not in {f.name for f in dataclasses.fields(c)}:
        return None
    value = getattr(c, name)
    if value is None:
        value = {"ffn": 4 * c.width, "decoder_layers": c.layers, "kv_heads": c.heads}.get(name)
    return value


def _shares(p: Pretrained, share: float, names: set[str]) -> dict[str, int]:
    """Returns the sizes with which the layers have about a `share` fewer parameters. ValueError: they can't."""
    c: Any = p.model.config
    sizes = dict[str, int]()
    if {"head_width", "plain_width"} & names:
        groups = c.kv_heads if "kv_heads" in names else c.heads
        sizes["heads"] = c.heads // groups * max(1, round(groups * (1 - share)))
    if c.moe is not None:
        return sizes | {"experts": max(c.moe.top_k, round(c.moe.experts * (1 - share)))}
    ffn = size_of(c, "ffn")
    if ffn is None:
        raise ValueError("share: this model's layers have no feed-forward network to cut; give sizes")
    if "heads" in sizes and "kv_heads" in names:
        sizes["kv_heads"] = choice.kv_heads(c.heads, c.kv_heads, sizes["heads"])

    def count(ffn: int) -> int:
        return units.parameters(specs, p.model.family.specs(config_io.changed(c, sizes | {"ffn": ffn}, "model.")))[1]

    specs = p.model.family.specs(c)
    whole, each = units.parameters(specs, specs)[0], count(2) - count(1)
    left = round((whole * (1 - share) - count(1)) / each) + 1
    if left < 1:
        raise ValueError(
            f"share: feed-forward networks hold less than {share:g} of the layers, and heads can't go without the "
            "width; give width and heads"
        )
    return sizes | {"ffn": min(left, ffn)}
