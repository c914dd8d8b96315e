"""What a run says of where it is stuck."""

import time

import pytest

from jaxlm.runtime.watchdog import MIN_LIMIT, Watchdog


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def waiting_for_a_batch(watch):
    until(watch.file.exists)
    time.sleep(0.3)  # a second look must not write again


def test_stacks_are_written_once_a_time_stuck(tmp_path, capfd):
    told = []
    late = "process 1 (b) is at step 4"
    with Watchdog(tmp_path, 3, seconds=0.05, describe_stragglers=lambda: late, on_stuck=told.append) as watch:
        waiting_for_a_batch(watch)
        assert len(told) == 1
        watch.beat(0.01)
        until(lambda: len(told) == 2)
    text = (tmp_path / "stacks-3.txt").read_text()
    assert text.count("no step has finished") == 2 and "in waiting_for_a_batch" in text
    assert "process 1 (b) is at step 4" in told[0] and str(watch.file) in told[0]
    out = capfd.readouterr().err
    assert "jaxlm: no step has finished" in out and "in waiting_for_a_batch" in out


def test_the_limit_follows_the_steps_and_what_lies_between():
    watch = Watchdog("unused")
    assert watch.limit == MIN_LIMIT
    assert Watchdog("unused", compile_seconds=100.0).limit == 1000.0  # another shape may have to be compiled
    watch.beat(40.0)
    assert watch.limit == 400.0
    watch._last -= 200.0  # a validation
    watch.beat(1.0)
    assert 600.0 <= watch.limit < 601.0
    assert Watchdog("unused", compile_seconds=100.0, seconds=7.0).limit == 7.0
    with pytest.raises(ValueError, match=r"train\.watchdog: -1"):
        Watchdog("unused", seconds=-1)


def test_it_never_speaks_while_steps_finish(tmp_path, capfd):
    with Watchdog(tmp_path, seconds=0.5) as watch:
        for _ in range(20):
            time.sleep(0.05)
            watch.beat(0.05)
    assert not watch.file.exists() and not capfd.readouterr().err
