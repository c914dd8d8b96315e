"""Rows of earlier tasks: which are kept, and where they stand."""

import numpy as np
import pytest

from jaxlm.data import replay
from jaxlm.data.loader import Loader


def kept(task: str, n: int, classes: int = 2, length: int = 4) -> replay.Kept:
    order, priorities = replay.first(7, task, n, n)
    target = np.eye(classes, dtype=np.float32)[order % classes]
    segments = (np.arange(length)[None] < 1 + order[:, None] % length).astype(np.int32)
    arrays = {"tokens": order[:, None].repeat(length, 1), "target": target, "segments": segments}
    return replay.Kept(task, arrays, priorities)


def sizes(tasks: list[replay.Kept]) -> list[int]:
    return [len(task) for task in tasks]


def test_every_example_is_kept_as_often():
    """Reservoir sampling: over many seeds each of 20 examples is among the 5 kept a quarter of the time."""
    counts = np.zeros(20)
    for seed in range(2000):
        counts[replay.first(seed, "a", 20, 5)[0]] += 1
    assert np.all(np.abs(counts / 2000 - 0.25) < 0.04)


def test_a_smaller_memory_is_part_of_a_larger_one():
    small, large = replay.first(3, "a", 100, 10)[0], replay.first(3, "a", 100, 40)[0]
    np.testing.assert_array_equal(small, large[:10])
    assert not np.array_equal(small, replay.first(3, "b", 100, 10)[0])


def test_balances():
    tasks = [kept("a", 90), kept("b", 30)]
    assert sizes(replay.chosen(tasks, examples=40, tokens=0, balance="task")) == [20, 20]
    reservoir = sizes(replay.chosen(tasks, examples=40, tokens=0, balance="none"))
    assert sum(reservoir) == 40 and reservoir[0] > 24  # three of four come of the larger task
    chosen = replay.chosen([kept("a", 90, classes=3)], examples=30, tokens=0, balance="class")[0]
    np.testing.assert_array_equal(chosen.arrays["target"].sum(0), [10, 10, 10])
    rare = kept("a", 90)
    rare.arrays["target"][:] = [1, 0]
    rare.arrays["target"][5] = [0, 1]
    chosen = replay.chosen([rare], examples=10, tokens=0, balance="class")[0]
    assert chosen.arrays["target"][:, 1].sum() == 1, "the only example of its class is kept"


def test_tokens_bound_a_memory():
    tasks = [kept("a", 50), kept("b", 50)]
    chosen = replay.chosen(tasks, examples=0, tokens=60, balance="task")
    tokens = sum(int(task.arrays["segments"].sum()) for task in chosen)
    assert 56 < tokens <= 60
    assert abs(len(chosen[0]) - len(chosen[1])) <= 1
    with pytest.raises(ValueError, match="not a single row"):
        replay.chosen([kept("a", 0)], examples=5, tokens=0, balance="task")


def test_the_order_is_the_same_on_any_number_of_hosts():
    tasks = (kept("a", 9), kept("b", 5))
    whole = replay.Replayed(tasks, micro_batches=2, rows=4, seed=1, every_task=False)
    halves = [replay.Replayed(tasks, 2, 4, 1, False, mine) for mine in ((0, 1), (2, 3))]
    for step in (0, 3, 17):
        batch, parts = whole(step), [half(step) for half in halves]
        for name, leaf in batch.items():
            np.testing.assert_array_equal(leaf, np.concatenate([part[name] for part in parts], 1))
        again = whole(step)
        assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_tasks_take_turns_in_proportion_and_every_row_comes():
    tasks = (kept("a", 30), kept("b", 10))
    replayed = replay.Replayed(tasks, micro_batches=1, rows=2, seed=0, every_task=False)
    turns = {0: 0, 1: 0}
    seen: dict[int, set] = {0: set(), 1: set()}
    for step in range(400):
        ((number, part),) = replay.parted(replayed(step))[1].items()
        turns[number] += 1
        seen[number] |= set(part["tokens"][0, :, 0].tolist())
    assert abs(turns[0] - 300) <= 5
    assert len(seen[0]) == 30 and len(seen[1]) == 10
    every = replay.Replayed(tasks, 1, 2, 0, True)
    assert sorted(replay.parted(every(5))[1]) == [0, 1] and every.rows_per_batch == 4


def test_a_loader_adds_them_to_its_batches():
    records = [np.full(4, i) for i in range(6)]
    replayed = replay.Replayed((kept("a", 8),), 1, 2, 0, False)
    loader = Loader([records], [1.0], lambda record, rng: {"tokens": record}, batch_size=3, added=replayed)
    batch = loader.batch(2)
    own, earlier = replay.parted(batch)
    assert own["tokens"].shape == (1, 3, 4) and earlier[0]["tokens"].shape == (1, 2, 4)
    np.testing.assert_array_equal(next(loader.iterate(2))["replay/0/tokens"], earlier[0]["tokens"])
