"""Worker processes start without the user's script: a script that isn't guarded by `if __name__ == "__main__"` would
otherwise run again in each of them."""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def script_hidden(sent: Any) -> Iterator[None]:
    """Hides the program's script from processes that are spawned within, which multiprocessing has import it.

    It is not hidden where what workers are `sent` is defined in it: the script must then be guarded.
    """
    try:
        needed = b"__main__" in pickle.dumps(sent)
    except (pickle.PicklingError, AttributeError, TypeError):
        needed = True  # whoever sends it by other means knows how to find it
    if needed:
        yield
        return
    main = sys.modules["__main__"]
    names = ("__spec__", "__file__")
    before: dict[str, Any] = {name: main.__dict__[name] for name in names if name in main.__dict__}
    try:
        main.__dict__.pop("__file__", None)
        main.__spec__ = None
        yield
    finally:
        main.__dict__.update(before)
