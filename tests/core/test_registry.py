"""Tables of names: what other packages add, and what they can't."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from jaxlm.core import registry


@dataclass(frozen=True)
class First:
    size: int = 1


@dataclass(frozen=True)
class Second:
    size: int = 2


def table() -> registry.ConfigTable:
    return registry.ConfigTable("thing", {})


def test_a_row_is_found_by_its_name_and_by_its_settings():
    things, row = table(), SimpleNamespace(Config=First)
    things.add("first", row)
    things.add("first", row)  # twice is once
    assert things["first"] is row and things.of(First()) is row and registry.name_of(First()) == "first"


def test_what_is_refused_leaves_nothing_behind():
    things, row = table(), SimpleNamespace(Config=First)
    things.add("first", row)
    with pytest.raises(ValueError, match="'again': First is registered as 'first' already"):
        things.add("again", SimpleNamespace(Config=First))
    assert list(things) == ["first"]
    with pytest.raises(ValueError, match="thing: 'first' is the name of another thing already"):
        things.add("first", SimpleNamespace(Config=Second))
    with pytest.raises(ValueError, match="is the Config of no registered"):
        registry.name_of(Second())


def test_an_installed_package_that_fails_is_told_each_time(monkeypatch):
    point = SimpleNamespace(name="broken", value="far.away", dist=SimpleNamespace(name="far"), load=lambda: 1 / 0)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "jaxlm.things" else [])
    things = table()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"thing 'broken' of the installed package far can't be loaded \(Zero"):
            things.find("x", "thing")
