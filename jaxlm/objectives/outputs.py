"""Holds what a model predicts at each place of a batch, and says how two models' predictions differ.

B rows, N places of a row, V classes (the vocabulary's tokens, or a head's labels), K of them.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

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


def divergence(before: Predicted, now: Predicted, temperature: float, shard: Layout) -> jax.Array:
    """Returns T² · KL(before ‖ now) of each place `[B, N]`, of logits divided by the temperature T (Hinton et al.
    2015); for numbers half their squared difference. `before` gets no gradient."""

    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        old = jax.lax.stop_gradient(old)
        if now.kind == "value":
            return 0.5 * jnp.square(new - old).sum(-1)
        old, new = old / temperature, new / temperature
        if now.kind == "sigmoid":
            p = jax.nn.sigmoid(old)
            gain = p * (jax.nn.log_sigmoid(old) - jax.nn.log_sigmoid(new))
            gain += (1 - p) * (jax.nn.log_sigmoid(-old) - jax.nn.log_sigmoid(-new))
            return temperature**2 * gain.sum(-1)
        log_old, log_new = jax.nn.log_softmax(old), jax.nn.log_softmax(new)
        return temperature**2 * (jnp.exp(log_old) * (log_old - log_new)).sum(-1)

    return _each(one, [before, now], shard=shard)


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


def stored(outputs: Predicted, k: int, shard: Layout) -> Stored:
    """Returns the predictions of each place with its k likeliest classes, or all where there are fewer."""

    def one(z: jax.Array) -> Stored:
        top, classes = jax.lax.top_k(z, min(k, z.shape[-1]) if outputs.kind == "softmax" else z.shape[-1])
        if outputs.kind != "softmax":
            return Stored(top, classes, jnp.zeros(z.shape[:-1], z.dtype))
        values, rest = _among(z, classes)
        return Stored(values, classes, rest)

    return Stored(*_each(one, [outputs], shard=shard))


def divergence_from(before: Stored, now: Predicted, shard: Layout) -> jax.Array:
    """Returns KL(before ‖ now) of each place `[B, N]`, in nats; for numbers half their squared difference.

    The classes that aren't stored count as one. That leaves the exact divergence where there are none, and else a lower
    bound of it, by the data processing inequality.
    """

    def one(z: jax.Array, values: jax.Array, classes: jax.Array, rest: jax.Array) -> jax.Array:
        if now.kind != "softmax":
            old = Predicted(values, now.weights_BN, now.kind)
            return divergence(old, old._replace(logits=jnp.take_along_axis(z, classes, -1)), 1.0, shard)
        new_values, new_rest = _among(z, classes)
        others = jnp.where(rest > NEVER, jnp.exp(rest) * (rest - new_rest), 0.0)
        return (jnp.exp(values) * (values - new_values)).sum(-1) + others

    return _each(one, [now], *before, shard=shard)


def _among(z: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log probabilities of some classes, and that of all others together: `NEVER` where there are none."""
    total = jax.nn.logsumexp(z, -1)
    others = jnp.put_along_axis(z, classes, -jnp.inf, axis=-1, inplace=False)
    rest = jnp.maximum(jax.nn.logsumexp(others, -1) - total, NEVER)
    return jnp.take_along_axis(z, classes, -1) - total[..., None], rest
