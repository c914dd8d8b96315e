"""Jitted functions whose first argument is given: numbers that a caller needn't know of, and that a compiled program
takes as data, so that one program serves all their values."""

from typing import Any

import jax


class Given:
    """A Given is a jitted `f(first, *rest)`, or what tracing, lowering and compiling make of it, as a function of
    `rest`."""

    def __init__(self, f: Any, first: Any) -> None:
        self._f, self._first = f, first

    def __call__(self, *rest: Any) -> Any:
        """Returns what the function does."""
        return self._f(self._first, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._f, name)  # what the stages of JAX tell: `as_text`, `memory_analysis`, `jaxpr`, …

    def trace(self, *rest: Any) -> "Given":
        """Returns it traced for arguments like these (`jax.stages.Traced`)."""
        return Given(self._f.trace(self._first, *rest), self._first)

    def lower(self, *rest: Any) -> "Given":
        """Returns it lowered for arguments like these, or as it was traced (`jax.stages.Lowered`)."""
        first = () if isinstance(self._f, jax.stages.Traced) else (self._first,)
        return Given(self._f.lower(*first, *rest), self._first)

    def compile(self, *args: Any, **kwargs: Any) -> "Given":
        """Returns what was lowered, compiled (`jax.stages.Compiled`)."""
        return Given(self._f.compile(*args, **kwargs), self._first)
