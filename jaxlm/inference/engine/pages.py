"""The prefix cache's book: which page holds which tokens, who uses it, and which is given up for another.

A page holds the keys and values of `size` tokens in a row. Its name is a digest of these tokens and of all before them
in their text, so that two texts share the pages of what they have in common at the beginning. Only whole pages are
kept.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class Pages:
    """A book of pages, numbered from 1; page 0 holds what nobody wants.

    A page is free, cached (it has a name and no user) or used (it has a name and users). The one that was used longest
    ago is given up first, and of one text the last page first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count, 0, -1))
        self._cached: OrderedDict[bytes, int] = OrderedDict()
        self._used: dict[bytes, tuple[int, int]] = {}  # the page and how many use it

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return len(self._used)

    def names(self, tokens: Sequence[int], salt: str = "") -> list[bytes]:
        """Returns the names of the whole pages of a text."""
        out, name = [], hashlib.blake2b(salt.encode(), digest_size=16).digest()
        data = np.asarray(tokens, np.int32)
        for start in range(0, len(tokens) - self.size + 1, self.size):
            name = hashlib.blake2b(name + data[start : start + self.size].tobytes(), digest_size=16).digest()
            out.append(name)
        return out

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Returns the pages of the first of `names` that are held, up to the first that isn't, and uses them."""
        out = []
        for name in names:
            if name in self._used:
                page, users = self._used[name]
                self._used[name] = page, users + 1
            elif name in self._cached:
                page = self._cached.pop(name)
                self._used[name] = page, 1
            else:
                break
            out.append(page)
        return out

    def add(self, names: Sequence[bytes]) -> list[int]:
        """Uses a page for each of `names`, which follow each other from the beginning of a text, as far as pages last.

        Returns the page that is to be filled for each name that has one now; 0 where the page was held already.
        """
        out = []
        for name in names:
            if self.find([name]):
                out.append(0)
                continue
            if not self._free and self._cached:
                self._free.append(self._cached.popitem(last=False)[1])
            if not self._free:
                break
            page = self._free.pop()
            self._used[name] = page, 1
            out.append(page)
        return out

    def release(self, names: Sequence[bytes]) -> None:
        """Ends one use of the pages of `names`; those that nobody uses stay as long as there is room."""
        for name in reversed(names):
            page, users = self._used.pop(name)
            if users > 1:
                self._used[name] = page, users - 1
            else:
                self._cached[name] = page
