"""A compression that dies in the middle."""

import contextlib
from collections.abc import Iterator

import pytest

from jaxlm.assembly.compress_journal import Journal


@contextlib.contextmanager
def killed_in_layer(number: int) -> Iterator[None]:
    """Within the context a compression is interrupted before it writes a layer of this number, and must be."""
    write = Journal.write

    def killed(self, stack, layer, *rest):
        if layer == number:
            raise KeyboardInterrupt
        write(self, stack, layer, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "write", killed)
        yield
