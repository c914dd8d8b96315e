"""Error messages take one line: what went wrong, and the nearest known name."""

import difflib
from collections.abc import Iterable

FEW = 20  # names that an error lists whole


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a suggestion that follows an unknown name: the known name closest to it, or else all known names, or of
    many the three nearest."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, 1, 0.5):
        return f"; did you mean {close[0]!r}?"
    if len(names) <= FEW:
        return f"; known: {', '.join(names)}"
    return f"; nearest of {len(names)}: {', '.join(difflib.get_close_matches(name, names, 3, 0.0))}"


def one_line(error: object, limit: int | None = None) -> str:
    """Returns an error's message on one line, cut after `limit` characters with an ellipsis."""
    text = " ".join(str(error).split())
    return text if limit is None or len(text) <= limit else text[:limit] + " …"
