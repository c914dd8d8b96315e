"""What a process takes of its machine is measured between two readings."""

from types import SimpleNamespace

from jaxlm.runtime import load


def test_cores_are_those_since_the_last_reading(monkeypatch):
    clock, spent = iter([0.0, 10.0, 14.0]), iter([5.0, 20.0, 21.0])
    monkeypatch.setattr(load, "_processor_seconds", lambda: next(spent))
    found = load.Load([], now=lambda: next(clock))
    assert found.read()["cpu"] == 1.5 and found.read()["cpu"] == 0.25


def test_the_fullest_device_counts_and_one_that_does_not_tell_is_none():
    devices = [SimpleNamespace(memory_stats=lambda n=n: n and {"bytes_in_use": n}) for n in (None, 5, 7)]
    assert load.Load(devices).read()["device_bytes"] == 7  # type: ignore[arg-type]
    silent = load.Load(devices[:1]).read()  # type: ignore[arg-type]
    assert silent["device_bytes"] is None and silent["memory_bytes"] > 1e7
