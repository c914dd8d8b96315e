"""Holds the settings of growing a model (`jaxlm grow`). Nothing here imports jax."""

from dataclasses import dataclass

from jaxlm.core.ranges import Count, Natural, NonNegative


@dataclass(frozen=True)
class Growth:
    """A Growth says how a model grows: exactly one of its first five fields is given."""

    blocks: Natural = 0
    """New layers that add nothing at first, each behind one of as many equal groups of layers."""
    stack: Natural = 0
    """How many times the whole stack of layers stands in the new model; the function changes."""
    widen: tuple[str, ...] = ()
    """New sizes as FIELD=N, by the names of the model's config: ffn=4096 heads=16 kv_heads=8 width=2048."""
    experts: Natural = 0
    """Experts that each feed-forward network becomes, all alike at first."""
    vocab: str = ""
    """New size of the vocabulary, or a tokenizer that adds tokens to the model's own."""
    top_k: Count = 2
    """experts: how many of them a token goes to."""
    noise: NonNegative = 0.0
    """widen: how unequally copies share what they send on, in deviations of a weight; the function stays."""
    seed: Natural = 0
    """Of routers and of the noise."""
