"""Error messages take one line: what went wrong, and the nearest known name."""

import difflib
import errno
import re
from collections.abc import Iterable

FAULTS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file would grow beyond the size limit of this process or file system: raise `ulimit -f`",
    errno.EACCES: "permission denied: make the folder writable",
    errno.EPERM: "operation not permitted: make the folder writable",
    errno.EROFS: "the file system is read-only: choose a writable folder",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EISDIR: "is a folder: name a file",
    errno.ENOENT: "there is no such file: check the path",
}
"""What went wrong with files and what helps, by the number of the system's error."""
SAME_WORD = 0.88  # share of letters in common from which a name is a slip of the pen
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


def misspelt(name: str, known: Iterable[str]) -> str:
    """Returns a suggestion that follows the unknown name of an architecture or of a part of one: the known name that is
    meant, or nothing. Most names that are spelt alike are other architectures, above all those of other numbers and
    those that add letters to a known name (mllama, gemma3n, ministral3)."""
    close = difflib.get_close_matches(name, sorted(known), 1, SAME_WORD)
    meant = close and len(name) <= len(close[0]) and _digits(name) == _digits(close[0])
    return f"; did you mean {close[0]!r}" if meant else ""


def _digits(name: str) -> list[str]:
    return re.findall(r"\d", name)


def of_system(error: OSError) -> str:
    """Returns what went wrong with a file and what helps."""
    return FAULTS.get(error.errno or 0, error.strerror or str(error))


def one_line(error: object, limit: int | None = None) -> str:
    """Returns an error's message on one line, cut after `limit` characters with an ellipsis."""
    text = " ".join(str(error).split())
    return text if limit is None or len(text) <= limit else text[:limit] + " …"
