"""Says which smaller model a run takes its settings from, so that what was tuned on that one holds for this one."""

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxlm.core.ranges import Count, Positive, Range


@dataclass(frozen=True)
class Transfer:
    """Chooses how initial weights and learning rates change with the width and the depth of the model."""

    method: Literal["none", "mup"] = "none"
    """none: as the family and `optim` say, whatever the sizes are. mup: such that the settings which are best for a
    model of `base_width`, and of `base_layers`, are best for this one too (Yang et al. 2022; CompleteP for depth, Dey
    et al. 2025); with adamw or muon."""
    base_width: Count | None = None
    """mup: `model.width` of the model whose settings these are. Its heads and ffn are taken to be smaller in the same
    proportion."""
    base_layers: Count | None = None
    """mup: its `model.layers`; None: it is as deep as this one, or the depth changes nothing."""
    depth_alpha: Annotated[float, Range(0.5, 1, below=False)] = 1.0
    """mup with `base_layers`: each half of a layer adds depth^-alpha of what it adds in the base model."""
    base_head_width: Count = 64
    """mup: width of a head at which scores are scaled by its root, as everywhere else; scores of wider heads fall with
    the width itself."""
    input_factor: Positive = 1.0
    """mup: what embeddings are multiplied by, a setting to tune on the base model."""
    output_factor: Positive = 1.0
    """mup: what logits are multiplied by, a setting to tune on the base model."""
