"""Scales the learning rates of single weights: by the height of their layer, and where a run's settings come from a
model of another size, with their gradients and Adam's epsilon."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.core import config, tree
from jaxlm.core.spec import Spec, is_spec, sequences


def depth_scales(c: config.Optim, specs: Any) -> Any:
    """Returns what each weight's updates are multiplied by for its height: embeddings, layers, heads.

    Stacks whose layers follow each other are one sequence; an encoder and a decoder are two, both of which end below
    the heads. Weight decay is part of an update, so a weight that is multiplied by 0 stays as it was. Raises ValueError
    where `optim.top_layers` is more than there are, or `optim.only_layers` names one that there isn't.
    """
    stacks = [s for s in tree.flatten(specs, is_spec).values() if s.axes[:1] == ("layers",)]
    deepest = max((s.shape[0] + s.layers_above for s in stacks), default=0)
    if c.layer_decay != 1 and not deepest:
        raise ValueError("optim.layer_decay: this model's weights name no layers to count; set it to 1")
    if c.top_layers is not None and not 0 <= c.top_layers <= deepest:
        raise ValueError(f"optim.top_layers: {c.top_layers} of {deepest} layers can't be trained")

    if c.only_layers and c.top_layers is not None:
        raise ValueError(
            "optim.only_layers: says which layers are trained, and so does optim.top_layers; leave one out"
        )
    if max(c.only_layers, default=-1) >= deepest:
        raise ValueError(
            f"optim.only_layers: there is no layer {max(c.only_layers)}; the last of {deepest} is {deepest - 1}"
        )
    first = {}  # the number of each stack's first layer
    for side in sequences(specs):
        for i, (stack, _) in enumerate(side):
            first[stack] = sum(n for _, n in side[:i])

    def one(path: str, s: Spec) -> Any:
        if s.axes[:1] != ("layers",):
            if not s.below_layers:
                return 1.0
            return 0.0 if c.top_layers is not None or c.only_layers else c.layer_decay ** (deepest + 1)
        height = s.layers_above + np.arange(s.shape[0], 0, -1.0)  # 1 for the last layer
        scale = c.layer_decay**height
        if c.top_layers is not None:
            scale[height > c.top_layers] = 0.0
        if c.only_layers:
            start = next(n for stack, n in first.items() if path == stack or path.startswith(f"{stack}/"))
            scale[~np.isin(start + np.arange(s.shape[0]), c.only_layers)] = 0.0
        return scale.astype(np.float32).reshape(-1, *[1] * (len(s.shape) - 1))

    return tree.map_named(one, specs)


class Scale(NamedTuple):
    """A Scale says how a weight is trained beside its counterpart in the model that the settings come from."""

    fold: float = 1.0
    """The weight is what a formula calls the weight, times this factor of its product, which no forward pass then
    needs to know. Gradients are those of the formula's weight, and updates are folded as the weight is."""
    adam: float = 1.0
    """Factor of the learning rate under Adam, of the formula's weight."""
    muon: float = 1.0
    """Factor of the learning rate under Muon."""
    eps: float = 1.0
    """Factor of Adam's epsilon, which falls with the gradients."""


Scales = Mapping[str, Scale]
"""Path of every weight → its scale; empty: all weights are trained as the settings say."""


def unfolded(scales: Scales) -> Callable[[Any], Any]:
    """Returns the function from gradients of folded weights to those of the formula's weights."""
    return lambda grads: _multiplied(grads, {path: s.fold for path, s in scales.items()})


def before(scales: Scales) -> optax.GradientTransformation:
    """Returns what comes before Adam: gradients over their factor of epsilon, which is the same as Adam with that
    epsilon, since its direction doesn't change with the size of gradients and epsilon together."""
    return optax.stateless(lambda u, _: _multiplied(u, {path: 1 / s.eps for path, s in scales.items()}))


def after(scales: Scales, rate: Callable[[Scale], float]) -> optax.GradientTransformation:
    """Returns what comes between an optimizer's direction and the weight decay, which so stays as `optim` says: each
    direction times the factor `rate` of its weight's learning rate, and folded."""
    return optax.stateless(lambda u, _: _multiplied(u, {path: factor(scales, path, rate) for path in scales}))


def factor(scales: Scales, path: str, rate: Callable[[Scale], float]) -> float:
    """Returns the factor of a weight's learning rate, as the weight is stored."""
    return scales[path].fold * rate(scales[path]) if path in scales else 1.0


def _multiplied(updates: Any, factors: Mapping[str, float]) -> Any:
    """Returns updates times their factors; holes of a partition stay."""

    def one(path: str, u: Any) -> Any:
        hole = isinstance(u, optax.MaskedNode) or factors[path] == 1
        return u if hole else u * jnp.asarray(factors[path], u.dtype)

    return tree.map_named(one, updates)
