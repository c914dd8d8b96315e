"""Losses of a student against its teacher, which any objective's loss takes beside its own: predictions, hidden states,
and relations of attention.

They are sums over places or tokens by their weights; no loss sees padding, or one text of a row from another.
`assembly` calls them with what both models make of one batch.

B rows, T positions, D width of the student, E of the teacher, A relation heads, C width of one.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxlm.core.distillation import Hidden, Logits, Relations
from jaxlm.models.model import Seen
from jaxlm.nn.layout import Layout
from jaxlm.nn.taps import HIDDEN
from jaxlm.objectives import outputs
from jaxlm.objectives.objective import DeviceBatch
from jaxlm.objectives.outputs import NEVER, Measure, Predicted, Stored


def real_tokens(batch: DeviceBatch) -> jax.Array:
    """Returns how many tokens of a batch aren't padding: the total weight of the losses on states and relations."""
    return (batch["segments"] > 0).sum().astype(jnp.float32)


def measure(c: Logits, used: int | None) -> Measure:
    """Returns how predictions are compared. `used`: the tokens in use, where classes are those of a vocabulary."""
    return Measure(c.divergence, c.temperature, c.beta, used)


def logits(c: Logits, teacher: Predicted | Stored, student: Predicted, used: int | None, shard: Layout) -> jax.Array:
    """Computes the sum over places, by the student's weights, of the divergence from the teacher's predictions."""
    how = measure(c, used)
    if isinstance(teacher, Predicted) and c.top_k and teacher.kind == "softmax":
        teacher = outputs.stored(teacher, c.top_k, shard, how)
    if isinstance(teacher, Predicted):
        apart = outputs.divergence(teacher, student, how, shard)
    else:
        apart = outputs.divergence_from(teacher, student, shard, how)
    return outputs.total(apart, student)


def hidden(
    c: Hidden, pairs: Sequence[tuple[int, int]], projections: Mapping[str, jax.Array], student: Seen, teacher: Seen,
    shard: Layout,
) -> jax.Array:  # fmt: skip
    """Computes the sum over tokens of how far the states of layers differ, the mean over pairs (student's layer,
    teacher's layer). `projections`: the learned map of each pair's student, by its number, where there is one."""
    total, real_BT = jnp.zeros(()), shard(student.segments_BT, "batch", None) > 0
    for i, (mine, theirs) in enumerate(pairs):
        x_BTD = _whole(student.layers[mine][HIDDEN], shard)
        y_BTD = jax.lax.stop_gradient(_whole(teacher.layers[theirs][HIDDEN], shard))
        if (w_DE := projections.get(str(i))) is not None:
            x_BTD = shard.einsum("btd,de->bte", x_BTD, shard(w_DE, None, None), "batch", None, None)
        if c.measure == "mse":
            apart_BT = jnp.square(x_BTD - y_BTD).mean(-1)
        else:
            square = lambda x: jnp.square(x).sum(-1)  # noqa: E731
            sizes_BT = jnp.maximum(square(x_BTD), 1e-12) * jnp.maximum(square(y_BTD), 1e-12)
            apart_BT = 1 - (x_BTD * y_BTD).sum(-1) * jax.lax.rsqrt(sizes_BT)
        total += (apart_BT * real_BT).sum()
    return total / len(pairs)


def relations(
    c: Relations, layers: tuple[int, int], heads: int, student: Seen, teacher: Seen, shard: Layout
) -> jax.Array:
    """Computes the sum over tokens of KL(teacher ‖ student) of the relations of each token to those of its text, the
    mean over relation heads and over queries, keys and values (Wang et al. 2021, equation 2). `layers`: the student's
    and the teacher's. The relations of one head exist at a time."""
    segments_BT = shard(student.segments_BT, "batch", None)
    seen_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT[:, None, :] > 0)
    real_BT = (segments_BT > 0).astype(jnp.float32)

    def one(both: tuple[jax.Array, jax.Array]) -> jax.Array:
        new, old = (_related(x_BTC, seen_BTT, shard) for x_BTC in both)
        return ((jnp.exp(old) * (old - new)).sum(-1) * real_BT).sum()

    total = jnp.zeros(())
    for name in c.of:
        mine = _heads(student.layers[layers[0]][name], heads, shard)
        theirs = jax.lax.stop_gradient(_heads(teacher.layers[layers[1]][name], heads, shard))
        total += jax.lax.map(jax.checkpoint(one), (mine, theirs)).sum()
    return total / (heads * len(c.of))


def _whole(x: jax.Array, shard: Layout) -> jax.Array:
    """Returns states in float32, of which every device has its rows whole."""
    return shard(x, "batch", *[None] * (x.ndim - 1)).astype(jnp.float32)


def _heads(x_BTHC: jax.Array, heads: int, shard: Layout) -> jax.Array:
    """Returns queries, keys or values as relation heads, `[A, B, T, C]`."""
    x = _whole(x_BTHC, shard)
    return jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 0)


def _related(x_BTC: jax.Array, seen_BTT: jax.Array, shard: Layout) -> jax.Array:
    """Returns the log of each token's relations to the tokens that it sees, `[B, T, T]`."""
    scores_BTT = jnp.einsum("btc,bsc->bts", x_BTC, x_BTC) / math.sqrt(x_BTC.shape[-1])
    return jax.nn.log_softmax(jnp.where(seen_BTT, scores_BTT, NEVER), -1)
