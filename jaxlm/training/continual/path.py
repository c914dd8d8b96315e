"""Notes what a training run's own path says of its weights: synaptic intelligence and the Riemannian walk.

Tracks are trees that an update carries on; they are part of the state, and checkpoints hold them. Gradients are those
of the task alone, before penalties and clipping.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core.continual import SI, RWalk

TINY = 1e-20  # keeps quotients finite; a float32 step squared, times a Fisher information, may well be 1e-15


def si_start(weights: Any) -> dict[str, Any]:
    """Returns the tracks at the first update: what each weight's path lowered the loss by, and where it began."""
    return {"path": _zeros(weights), "start": jax.tree.map(lambda w: jnp.array(w, jnp.float32), weights)}


def si_observe(tracks: dict[str, Any], gradient: Any, old: Any, new: Any) -> dict[str, Any]:
    """Adds −g · Δθ of an update to the path: its sum over weights is the loss that the path lowered, to first order."""
    path = jax.tree.map(lambda p, g, a, b: p - g * (b - a), tracks["path"], gradient, old, new)
    return tracks | {"path": path}


def si_importance(c: SI, tracks: dict[str, Any], weights: Any) -> Any:
    """Returns 2 · max(0, path) / (way² + damping), so that the penalty of strength 1 is the method's surrogate loss."""
    return jax.tree.map(
        lambda p, s, w: 2 * jnp.maximum(p, 0) / (jnp.square(w - s) + c.damping),
        tracks["path"],
        tracks["start"],
        weights,
    )


def rwalk_start(weights: Any) -> dict[str, Any]:
    """Returns the tracks at the first update: the averaged Fisher information and the path's score."""
    return {"fisher": _zeros(weights), "score": _zeros(weights)}


def rwalk_observe(c: RWalk, tracks: dict[str, Any], gradient: Any, old: Any, new: Any, rows: int) -> dict[str, Any]:
    """Goes on with both averages. A batch's squared mean gradient times its `rows` estimates the mean square of its
    examples' gradients where these have mean zero, so that the estimate doesn't shrink with the batch."""
    fisher = jax.tree.map(lambda f, g: c.decay * f + (1 - c.decay) * rows * jnp.square(g), tracks["fisher"], gradient)
    score = jax.tree.map(
        lambda s, f, g, a, b: s - g * (b - a) / (0.5 * f * jnp.square(b - a) + TINY),
        tracks["score"], fisher, gradient, old, new,
    )  # fmt: skip
    return {"fisher": fisher, "score": score}


def rwalk_importance(tracks: dict[str, Any]) -> Any:
    """Returns the sum of both tracks, each without what is negative and divided by its largest value over all
    weights."""
    positive = jax.tree.map(lambda x: jnp.maximum(x, 0), tracks)
    return jax.tree.map(jnp.add, *(_scaled(t) for t in positive.values()))


def _scaled(tree: Any) -> Any:
    largest = jnp.maximum(jnp.stack([x.max() for x in jax.tree.leaves(tree)]).max(), TINY)
    return jax.tree.map(lambda x: x / largest, tree)


def _zeros(weights: Any) -> Any:
    return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
