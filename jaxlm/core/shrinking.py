"""Holds the settings of making a model smaller (`jaxlm shrink`). Nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

from jaxlm.core.ranges import BelowOne, Count

Importance = Literal["activation", "magnitude", "loss"]


@dataclass(frozen=True)
class Shrinking:
    """A Shrinking says what is left of a model and by what it is chosen. A size that isn't given stays as it is."""

    heads: Count | None = None
    """Heads that are kept in each layer. Whole groups of a key/value head go where the number allows it."""
    kv_heads: Count | None = None
    """Key/value heads that are kept, with their heads."""
    ffn: Count | None = None
    """Width of the feed-forward networks that is kept in each layer."""
    experts: Count | None = None
    """Experts that are kept in each layer."""
    width: Count | None = None
    """Width of the residual stream that is kept; heads keep their own."""
    layers: Count | None = None
    """Layers that are kept, of an encoder-decoder those of the encoder."""
    decoder_layers: Count | None = None
    """Layers of an encoder-decoder's decoder that are kept."""
    share: BelowOne = 0.0
    """In place of sizes: the share of the layers' parameters that goes, of heads and feed-forward networks alike, or
    of the latter alone where heads can't go without the width."""
    importance: Importance = "activation"
    """activation: the mean square of what a unit sends on, and for layers how far they turn the states; magnitude: the
    weights alone; loss: how much the loss would change, to first order, and for layers as it does without them."""
    compensate: bool = False
    """Change the matrices behind heads and feed-forward neurons such that the rest makes up for what goes, by least
    squares over the calibration's inputs."""
    batches: Count = 16
    """How many batches of the calibration's text are read."""
    held_out_batches: Count = 16
    """How many batches of held-out text the loss is measured on, before and after."""
