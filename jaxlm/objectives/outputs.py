"""Holds what a model predicts at each place of a batch, and says how two models' predictions differ.

B rows, N places of a row, V classes (the vocabulary's tokens, or a head's labels), K of them.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.distillation import Divergence
from jaxlm.nn.layout import Layout
from jaxlm.nn.losses import Readout, over_logits

NEVER = -1e8  # logits below are of what can't be chosen


class Predicted(NamedTuple):
    """The outputs are logits, or the factors that they are made of."""

    logits: Readout | jax.Array
    """`[B, N, V]`."""
    weights_BN: jax.Array
    """How much each place counts."""
    kind: Literal["softmax", "sigmoid", "value"] = "softmax"
    """What logits mean: one class of V, each of V classes by itself, or numbers."""


def _each(f: Callable[..., Any], outputs: list[Predicted], *arrays: jax.Array, shard: Layout) -> Any:
    """Returns f of the logits of several outputs at the same places."""
    if all(isinstance(o.logits, Readout) for o in outputs):
        return over_logits(f, [o.logits for o in outputs], *arrays, shard=shard)  # type: ignore[misc]
    return f(*(o.logits for o in outputs), *arrays)


def total(values_BN: jax.Array, outputs: Predicted) -> jax.Array:
    """Returns the sum over all places by their weights."""
    return (values_BN * outputs.weights_BN).sum()


def same_top(before: Predicted, now: Predicted, shard: Layout) -> jax.Array:
    """Returns 1 for each place `[B, N]` where both outputs have the same likeliest class, else 0."""
    same = lambda old, new: (old.argmax(-1) == new.argmax(-1)).astype(jnp.float32)  # noqa: E731
    return _each(same, [before, now], shard=shard)


class Measure(NamedTuple):
    """A Measure says how the predictions of two models are compared."""

    kind: Divergence = "forward"
    """forward: KL(before ‖ now); reverse: KL(now ‖ before); jsd: β · KL(before ‖ m) + (1 − β) · KL(now ‖ m), of
    m = β · before + (1 − β) · now."""
    temperature: float = 1.0
    """T, which logits are divided by; the divergence is multiplied by T² (Hinton et al. 2015)."""
    beta: float = 0.5
    """β."""
    used: int | None = None
    """Classes from here on are padding of a vocabulary and not compared; None: there are none."""

    def shown(self, z: jax.Array) -> jax.Array:
        """Returns logits divided by the temperature, those of padding such that it is never chosen."""
        if self.used is None or self.used >= z.shape[-1]:
            return z / self.temperature
        real = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) < self.used
        return jnp.where(real, z / self.temperature, NEVER)

    def apart(self, before: jax.Array, now: jax.Array) -> jax.Array:
        """Returns the divergence of log probabilities over the last axis."""
        if self.kind == "forward":
            return (jnp.exp(before) * (before - now)).sum(-1)
        if self.kind == "reverse":
            return (jnp.exp(now) * (now - before)).sum(-1)
        if not 0 < self.beta < 1:
            return jnp.zeros(now.shape[:-1], now.dtype)
        mixed = jnp.logaddexp(before + math.log(self.beta), now + math.log(1 - self.beta))
        parts = self.beta * jnp.exp(before) * (before - mixed) + (1 - self.beta) * jnp.exp(now) * (now - mixed)
        return parts.sum(-1)

    def between(self, before: jax.Array, now: jax.Array, kind: str) -> jax.Array:
        """Returns T² times the divergence of logits over the last axis, which mean what `kind` says (`Predicted`); for
        numbers half their squared difference."""
        if kind == "value":
            return 0.5 * jnp.square(now - before).sum(-1)
        before, now = self.shown(before), self.shown(now)
        if kind == "sigmoid":
            both = [jnp.stack([jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)], -1) for z in (before, now)]
            return self.temperature**2 * self.apart(*both).sum(-1)
        return self.temperature**2 * self.apart(jax.nn.log_softmax(before), jax.nn.log_softmax(now))


def divergence(before: Predicted, now: Predicted, how: Measure, shard: Layout) -> jax.Array:
    """Returns how far the predictions of each place are from those `before`, `[B, N]`, in nats. `before` gets no
    gradient; its vocabulary may have more padding than the other's, or less."""

    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        most = max(old.shape[-1], new.shape[-1])
        old, new = (z if z.shape[-1] == most else _padded(z, most) for z in (jax.lax.stop_gradient(old), new))
        return how.between(old, new, now.kind)

    return _each(one, [before, now], shard=shard)


def _padded(z: jax.Array, size: int) -> jax.Array:
    """Returns logits of more classes, which are never chosen."""
    return jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, size - z.shape[-1])], constant_values=NEVER)


def squared_norm(outputs: Predicted, shard: Layout) -> jax.Array:
    """Returns the squared norm of each place's logits, `[B, N]`."""
    return _each(lambda z: jnp.where(z > NEVER, jnp.square(z), 0.0).sum(-1), [outputs], shard=shard)


def drawn_loss(outputs: Predicted, key: jax.Array, shard: Layout) -> jax.Array:
    """Returns −log p(y) of each place `[B, N]`, for a y that is drawn from the model's own prediction there; numbers
    are drawn with variance 1."""
    shape = outputs.weights_BN.shape
    keys = jax.random.split(key, shape).reshape(*shape)

    def one(z: jax.Array, keys: jax.Array) -> jax.Array:
        vmap = lambda f: jax.vmap(jax.vmap(f))  # noqa: E731
        if outputs.kind == "value":
            noise = vmap(lambda k: jax.random.normal(k, z.shape[-1:]))(keys)
            return 0.5 * jnp.square(z - jax.lax.stop_gradient(z + noise)).sum(-1)
        if outputs.kind == "sigmoid":
            y = vmap(lambda k, z: jax.random.bernoulli(k, jax.nn.sigmoid(z)))(keys, z)
            return -jnp.where(y, jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)).sum(-1)
        y = vmap(jax.random.categorical)(keys, jax.lax.stop_gradient(z))
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]

    return _each(one, [outputs], keys, shard=shard)


def largest(outputs: Predicted, k: int, shard: Layout) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest logits of each place `[B, N, K]` and the classes they are of; all where there are fewer."""

    def one(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, classes = jax.lax.top_k(z, min(k, z.shape[-1]))
        return values, classes.astype(jnp.int32)

    return _each(one, [outputs], shard=shard)


def stored_difference(outputs: Predicted, values_BNK: jax.Array, classes_BNK: jax.Array, shard: Layout) -> jax.Array:
    """Returns the mean squared difference between logits and stored ones at the classes that were stored, `[B, N]`."""

    def one(z: jax.Array, values: jax.Array, classes: jax.Array) -> jax.Array:
        return jnp.square(jnp.take_along_axis(z, classes, -1) - values).mean(-1)

    return _each(one, [outputs], values_BNK, classes_BNK, shard=shard)


class Stored(NamedTuple):
    """A Stored holds a model's predictions in little room: the log probabilities of the likeliest classes, and that of
    all others together. Sigmoids and numbers are stored as they are."""

    values_BNK: jax.Array
    classes_BNK: jax.Array
    rest_BN: jax.Array


def stored(outputs: Predicted, k: int, shard: Layout, how: Measure = Measure()) -> Stored:  # noqa: B008
    """Returns the predictions of each place with its k likeliest classes, or all where there are fewer, of logits
    divided by the temperature. Nothing has a gradient."""

    def one(z: jax.Array) -> Stored:
        z = shard(jax.lax.stop_gradient(z), "batch", None, None)  # classes are chosen among all
        if outputs.kind != "softmax":
            top, classes = jax.lax.top_k(z, z.shape[-1])
            return Stored(top, classes, jnp.zeros(z.shape[:-1], z.dtype))
        z = how.shown(z)
        _, classes = jax.lax.top_k(z, min(k, z.shape[-1]))
        values, rest = _among(z, classes)
        return Stored(values, classes, rest)

    return Stored(*_each(one, [outputs], shard=shard))


def divergence_from(before: Stored, now: Predicted, shard: Layout, how: Measure = Measure()) -> jax.Array:  # noqa: B008
    """Returns how far the predictions of each place are from stored ones, `[B, N]`, in nats, as `divergence` does.
    `how` has the temperature that these were stored with.

    The classes that aren't stored count as one. That leaves the exact divergence where there are none, and else a lower
    bound of it, by the data processing inequality.
    """

    def one(z: jax.Array, values: jax.Array, classes: jax.Array, rest: jax.Array) -> jax.Array:
        z = shard(z, "batch", None, None)
        if now.kind != "softmax":
            return how.between(values, jnp.take_along_axis(z, classes, -1), now.kind)
        new_values, new_rest = _among(how.shown(z), classes)
        old, new = (jnp.concatenate([v, r[..., None]], -1) for v, r in ((values, rest), (new_values, new_rest)))
        return how.temperature**2 * how.apart(old, new)

    return _each(one, [now], *before, shard=shard)


def _among(z: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log probabilities of some classes, and that of all others together: `NEVER` where there are none."""
    total = jax.nn.logsumexp(z, -1)
    values = jnp.take_along_axis(z, classes, -1) - total[..., None]
    if classes.shape[-1] == z.shape[-1]:  # whose gradient would be that of log 0
        return values, jnp.full(z.shape[:-1], NEVER, z.dtype)
    others = jnp.put_along_axis(z, classes, NEVER, axis=-1, inplace=False)
    return values, jnp.maximum(jax.nn.logsumexp(others, -1) - total, NEVER)
