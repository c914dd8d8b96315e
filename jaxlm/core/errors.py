"""Error messages take one line: what went wrong, and the nearest known name."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a suggestion that follows an unknown name: the known name closest to it, or else all known names."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def one_line(error: object, limit: int | None = None) -> str:
    """Returns an error's message on one line, cut after `limit` characters with an ellipsis."""
    text = " ".join(str(error).split())
    return text if limit is None or len(text) <= limit else text[:limit] + " …"
