"""Tables turn registered names into objects: the names that `config.json` and the command line use."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

from jaxlm.core.errors import nearest


class HasConfig(Protocol):
    """A row of a table must have a class of settings, by which the row is found again."""

    @property
    def Config(self) -> Any: ...


Row = TypeVar("Row", bound=HasConfig)
_NAMES: dict[type, str] = {}


def register(settings: type, name: str) -> None:
    """Registers a class of settings under a name. ValueError: it has another name already."""
    if _NAMES.setdefault(settings, name) != name:
        raise ValueError(f"{name!r}: {settings.__qualname__} is registered as {_NAMES[settings]!r} already")


class Table(Mapping[str, Row]):
    """A table is an immutable mapping from registered names to rows. Two rows may not share a `Config` class."""

    def __init__(self, kind: str, rows: Mapping[str, Row]) -> None:
        self.kind, self._rows = kind, dict(rows)
        for name, row in self._rows.items():
            register(row.Config, name)

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, settings: Any) -> Row:
        """Returns the row whose `Config` the settings are an instance of. ValueError: no row has that class."""
        name = _NAMES.get(type(settings), "")
        if name not in self._rows:
            raise ValueError(f"{self.kind}: {type(settings).__qualname__} is not registered{nearest(name, self._rows)}")
        return self._rows[name]


def name_of(settings: Any) -> str:
    """Returns the registered name of the row that these settings belong to. ValueError: none is registered."""
    try:
        return _NAMES[type(settings)]
    except KeyError:
        kind = type(settings)
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} is the Config of no registered model, objective or adapter"
        ) from None
