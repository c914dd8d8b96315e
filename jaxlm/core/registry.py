"""Tables turn registered names into objects: the names that `config.json` and the command line use.

Packages of others add rows by entry points, one group a table (`jaxlm.models`, `jaxlm.objectives`, `jaxlm.adapters`,
`jaxlm.optimizers`, `jaxlm.schedules`), or by `Table.add` in a module that `plugins.load` imports. A name in a file only
finds a row: whatever is installed is loaded, and nothing is imported because a file names it.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

from jaxlm.core.errors import nearest, one_line

Row = TypeVar("Row")
_NAMES: dict[type, str] = {}


def register(settings: type, name: str) -> None:
    """Registers a class of settings under a name. ValueError: it has another name already."""
    if _NAMES.setdefault(settings, name) != name:
        raise ValueError(f"{name!r}: {settings.__qualname__} is registered as {_NAMES[settings]!r} already")


class Table(Mapping[str, Row]):
    """A table maps registered names to rows, those of installed packages too; these are loaded when they are first
    needed: by an unknown name, or to list all names."""

    def __init__(self, kind: str, rows: Mapping[str, Row]) -> None:
        self.kind, self.group, self._rows = kind, f"jaxlm.{kind}s", dict(rows)
        self._installed = False

    def add(self, name: str, row: Row) -> None:
        """Adds a row of another package. ValueError: the name belongs to another row."""
        if self._rows.setdefault(name, row) is not row:
            raise ValueError(f"{self.kind}: {name!r} is the name of another {self.kind} already; choose another name")

    def _load_installed(self) -> None:
        if self._installed:
            return
        self._installed = True  # a module that is loaded may look into this table
        for point in entry_points(group=self.group):
            try:
                row = point.load()
            except Exception as error:
                self._installed = False
                package = point.dist.name if point.dist else point.value
                raise ValueError(
                    f"{self.kind} {point.name!r} of the installed package {package} can't be loaded "
                    f"({type(error).__name__}: {one_line(error, 200)}); mend or uninstall that package"
                ) from error
            self.add(point.name, row)

    def __getitem__(self, name: str) -> Row:
        if name not in self._rows:
            self._load_installed()
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        self._load_installed()
        return iter(self._rows)

    def __len__(self) -> int:
        self._load_installed()
        return len(self._rows)

    def find(self, name: str, field: str) -> Row:
        """Returns the row of a name that stands in `field`. ValueError: there is none."""
        if name in self:
            return self[name]
        remedy = nearest(name, self)
        if "did you mean" not in remedy:
            remedy += "; if it is of another package, install that, or name its module as a plugin"
        raise ValueError(f"{field}: unknown {name!r}{remedy}")


class HasConfig(Protocol):
    """A row of a `ConfigTable` has a class of settings, by which the row is found again."""

    @property
    def Config(self) -> Any: ...


Configured = TypeVar("Configured", bound=HasConfig)


class ConfigTable(Table[Configured]):
    """A table of rows that have a `Config` class each, which no two may share."""

    def __init__(self, kind: str, rows: Mapping[str, Configured]) -> None:
        super().__init__(kind, rows)
        for name, row in rows.items():
            register(row.Config, name)

    def add(self, name: str, row: Configured) -> None:
        """Adds a row of another package. ValueError: the name or the `Config` class belongs to another row."""
        if name not in self._rows:  # else the name is refused below, and the class stays free
            register(row.Config, name)
        super().add(name, row)

    def of(self, settings: Any) -> Configured:
        """Returns the row whose `Config` the settings are an instance of. ValueError: no row has that class."""
        if type(settings) not in _NAMES:
            self._load_installed()
        name = _NAMES.get(type(settings), "")
        if name not in self:
            kind = type(settings)
            raise ValueError(
                f"{self.kind}: {kind.__module__}.{kind.__qualname__} is the Config of no registered {self.kind}; "
                f"register it: jaxlm.register_{self.kind}(NAME, …)"
            )
        return self[name]


def name_of(settings: Any) -> str:
    """Returns the registered name of the row that these settings belong to. ValueError: none is registered."""
    try:
        return _NAMES[type(settings)]
    except KeyError:
        kind = type(settings)
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} is the Config of no registered model, objective or adapter"
        ) from None
