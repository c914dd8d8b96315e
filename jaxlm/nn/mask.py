"""Which position may attend to which."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

EVERYONE = 1 << 30  # a segment whose keys all other segments see too


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("segments_BT", "segments_BS", "prefix_BS", "at_T", "at_S"),
    meta_fields=("causal", "window", "common"),
)
@dataclass(frozen=True)
class Mask:
    """Which keys a query may see. Segment 0 is padding; arrays are None where the question doesn't arise."""

    causal: bool
    window: int | None = None
    """Only the last `window` positions, the query's own included."""
    segments_BT: jax.Array | None = None
    segments_BS: jax.Array | None = None
    prefix_BS: jax.Array | None = None
    """Keys that every query of their segment may see, causal or not."""
    at_T: jax.Array | None = None
    """Places of the queries in their row; None: 0, 1, 2 …"""
    at_S: jax.Array | None = None
    """Places of the keys; negative: an empty slot of a cache."""
    common: int = 0
    """So many first keys are no tokens of the row: every query sees them, and places are counted without them."""

    def places(self, start: int, stop: int, first: int, last: int) -> tuple[jax.Array, jax.Array]:
        """Places in the row of a block of queries and of a span of keys."""
        t = jnp.arange(start, stop) if self.at_T is None else self.at_T[start:stop]
        return t, jnp.arange(first, last) if self.at_S is None else self.at_S[first:last]

    def dense(self, start: int, stop: int, first: int, last: int) -> jax.Array | None:
        """Boolean `[B or 1, stop - start, last - first]` for a block of queries and a span of keys; None: all seen."""
        if self.common:
            assert first == 0, "common keys are seen by every block"
            seen = dataclasses.replace(self, common=0).dense(start, stop, 0, last - self.common)
            return None if seen is None else jnp.pad(seen, ((0, 0), (0, 0), (self.common, 0)), constant_values=True)
        t_T, s_S = self.places(start, stop, first, last)
        t, s = t_T[:, None], s_S[None, :]
        seen = None
        if self.causal:
            seen = (t >= s)[None]
        if self.prefix_BS is not None and seen is not None:
            seen = seen | self.prefix_BS[:, None, first:last]
        if self.window is not None:
            near = (t - s < self.window) if self.causal else (abs(t - s) < self.window)
            seen = near[None] if seen is None else seen & near[None]
        if self.at_S is not None:
            seen = (s >= 0)[None] if seen is None else seen & (s >= 0)[None]
        if self.segments_BT is not None and self.segments_BS is not None:
            keys_BS = self.segments_BS[:, None, first:last]
            same = (self.segments_BT[:, start:stop, None] == keys_BS) | (keys_BS == EVERYONE)
            seen = same if seen is None else seen & same
        return seen
