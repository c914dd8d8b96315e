"""Says which position may attend to which."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

EVERYONE = 1 << 30  # the segment whose keys all other segments see too


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("segments_BT", "segments_BS", "prefix_BS", "at_T", "at_S"),
    meta_fields=("causal", "window", "common", "packed"),
)
@dataclass(frozen=True)
class Mask:
    """A Mask says which keys a query may see.

    Segment 0 is padding. Arrays are None where nothing depends on them.
    """

    causal: bool
    window: int | None = None
    """Only the last `window` positions, the query's own included."""
    segments_BT: jax.Array | None = None
    segments_BS: jax.Array | None = None
    prefix_BS: jax.Array | None = None
    """Whether every query of a key's segment may see it, causal or not."""
    at_T: jax.Array | None = None
    """Positions of the queries in their row, `[T]`, or `[B, T]` where rows differ; None: 0, 1, 2 …"""
    at_S: jax.Array | None = None
    """Positions of the keys; a negative one is an empty slot of a cache."""
    common: int = 0
    """The number of first keys that are no tokens of the row: every query sees them, and positions don't count them."""
    packed: bool = False
    """Whether queries and keys are the same positions, and each segment is one run of them, as packing makes rows."""

    def positions(self, start: int, stop: int, first: int, last: int) -> tuple[jax.Array, jax.Array]:
        """Returns the positions in the row of a block of queries, `[T]` or `[B, T]`, and of a span of keys."""
        t = jnp.arange(start, stop) if self.at_T is None else self.at_T[..., start:stop]
        return t, jnp.arange(first, last) if self.at_S is None else self.at_S[first:last]

    def dense(self, start: int, stop: int, first: int, last: int) -> jax.Array | None:
        """Returns which of a span of keys a block of queries may see; None where it may see them all.

        The result is boolean, `[B or 1, stop - start, last - first]`.
        """
        if self.common:
            assert first == 0, "common keys are seen by every block"
            visible = dataclasses.replace(self, common=0).dense(start, stop, 0, last - self.common)
            return (
                None if visible is None else jnp.pad(visible, ((0, 0), (0, 0), (self.common, 0)), constant_values=True)
            )
        t_T, s_S = self.positions(start, stop, first, last)
        t, s = jnp.atleast_2d(t_T)[:, :, None], s_S[None, None, :]
        visible = None
        if self.causal:
            visible = t >= s
        if self.prefix_BS is not None and visible is not None:
            visible = visible | self.prefix_BS[:, None, first:last]
        if self.window is not None:
            near = (t - s < self.window) if self.causal else (abs(t - s) < self.window)
            visible = near if visible is None else visible & near
        if self.at_S is not None:
            visible = s >= 0 if visible is None else visible & (s >= 0)
        if self.segments_BT is not None and self.segments_BS is not None:
            keys_BS = self.segments_BS[:, None, first:last]
            same = (self.segments_BT[:, start:stop, None] == keys_BS) | (keys_BS == EVERYONE)
            visible = same if visible is None else visible & same
        return visible
