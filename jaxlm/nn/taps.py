"""Hands activations of layers out of a model while its program is traced, with no model edited.

Within a layer the arrays belong to a loop's body or to a function that is computed again; so whatever runs the layers
(`block_stack`) collects what one of them noted, returns it through that body, and puts it into `Taps.layers` outside.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

HIDDEN = "hidden"
"""What a layer hands to the next one."""


class Taps:
    """A Taps says which activations of each layer are wanted, by name, and holds those of the layers that ran since.

    Names are `HIDDEN`, and of products the weight's: `q`, `k`, `v`. A model that is called with a Taps must be called
    by a Taps of its own each time.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.layers: list[dict[str, Any]] = []
        """The activations of each layer, in the order in which they ran."""
        self._seen: dict[str, Any] | None = None

    def note(self, name: str, x: Any) -> None:
        """Notes an activation of the layer that is being traced, if it is wanted."""
        if self._seen is not None and name in self.names:
            self._seen[name] = x

    @contextlib.contextmanager
    def layer(self) -> Iterator[dict[str, Any]]:
        """Gives what is noted within the context, the trace of one layer."""
        self._seen = {}
        try:
            yield self._seen
        finally:
            self._seen = None
