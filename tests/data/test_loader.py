"""The loader: batches depend on (seed, step) alone, whoever computes which rows with how many workers."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.data import packing, token_cache
from jaxlm.data.loader import Loader, addressable_rows, evaluation_batches, to_device
from jaxlm.data.tokenizer import Bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> list[token_cache.Cache]:
    made = []
    for number, count in enumerate((30, 12)):
        folder = tmp_path_factory.mktemp("loader")
        for i in range(count):
            (folder / f"{i:02}.txt").write_text(f"{number}: document {i} " * (3 + i % 5))
        made.append(
            token_cache.open_cache(token_cache.prepare(str(folder), Bytes(), folder / "root", workers=1)["train"])
        )
    return made


def _noisy():
    """An objective's host half that uses its random stream."""

    def example(record, rng):
        return {"tokens": record["tokens"], "noise": rng.random(4), "label": np.int32(record["segments"].max())}

    return example


def _loader(caches, **more) -> Loader:
    parts = [packing.packed(caches[0], 32), packing.packed(caches[1], 32)]
    return Loader(parts, [3, 1], _noisy(), **({"batch_size": 8, "seed": 5} | more))


def _same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def _take(loader, start, count) -> list:
    iterator = loader.iterate(start)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _children() -> set[int]:
    """Processes started from here that are still running."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, stat = (folder / "cmdline").read_text(), (folder / "stat").read_text()
        except OSError:
            continue
        if (
            int(stat.rsplit(")", 1)[1].split()[1]) == os.getpid()
            and "spawn_main" in command
            and _alive(int(folder.name))
        ):
            found.add(int(folder.name))
    return found


# ------------------------------------------------------------------------------------------------------ order


class Unpicklable(list):
    """Records that must stay where they are."""

    def __reduce__(self):
        raise AssertionError("the records were pickled")


def test_records_are_not_copied_where_no_worker_needs_them():
    loader = Loader([Unpicklable([{"x": np.ones(2)}] * 4)], [1.0], lambda record, rng: record, batch_size=2)
    assert [batch["x"].shape for batch in _take(loader, 0, 2)] == [(1, 2, 2)] * 2


def test_shapes_and_indices(caches):
    loader = _loader(caches, micro_batches=2, rows=[1, 3])
    batch = loader.batch(3)
    assert {name: leaf.shape for name, leaf in batch.items()} == {
        "tokens": (2, 2, 33),
        "noise": (2, 2, 4),
        "label": (2, 2),
    }
    assert loader.indices(3).tolist() == [[25, 27], [29, 31]]
    assert loader.state(3) == {"seed": 5, "index": 24}
    for micro, row in itertools.product(range(2), range(2)):
        one = loader.example(int(loader.indices(3)[micro, row]))
        assert all(np.array_equal(batch[name][micro, row], one[name]) for name in one)


def test_hosts_that_share_the_rows_make_the_batch_of_one(caches):
    whole = _loader(caches, micro_batches=2)
    hosts = [_loader(caches, micro_batches=2, rows=rows) for rows in ([0, 3], [1, 2])]
    for step in range(12):
        joined = {name: np.empty_like(leaf) for name, leaf in whole.batch(step).items()}
        for host in hosts:
            for name, leaf in host.batch(step).items():
                joined[name][:, host.rows] = leaf
        assert _same(joined, whole.batch(step))


def test_micro_batches_only_fold_the_batch(caches):
    for step in range(5):
        flat = {name: leaf.reshape(8, *leaf.shape[2:]) for name, leaf in _loader(caches).batch(step).items()}
        for micro in (2, 4, 8):
            batch = _loader(caches, micro_batches=micro).batch(step)
            assert _same({name: leaf.reshape(8, *leaf.shape[2:]) for name, leaf in batch.items()}, flat)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_resuming_change_nothing(caches, workers):
    want = [_loader(caches).batch(step) for step in range(9)]
    loader = _loader(caches, workers=workers)
    assert all(map(_same, _take(loader, 4, 5), want[4:]))
    if workers == 0:
        assert all(map(_same, _take(loader, 0, 9), want))
    assert not _children()


def test_seeds_differ_and_shuffle_can_be_off(caches):
    assert not _same(_loader(caches).batch(0), _loader(caches, seed=6).batch(0))
    records = packing.packed(caches[0], 32)
    loader = Loader([records], [1.0], lambda record, rng: record, batch_size=4, shuffle=False)
    assert all(
        np.array_equal(loader.example(i)["tokens"], records[i % len(records)]["tokens"])
        for i in range(2 * len(records))
    )


def test_each_epoch_sees_every_record_once_in_a_new_order(caches):
    records = packing.packed(caches[1], 32)
    places = {records[i]["tokens"].tobytes(): i for i in range(len(records))}
    assert len(places) == len(records)
    loader = Loader([records], [1.0], lambda record, rng: record, batch_size=1)
    epochs = [
        [places[loader.example(e * len(records) + i)["tokens"].tobytes()] for i in range(len(records))]
        for e in range(3)
    ]
    assert all(sorted(order) == list(range(len(records))) for order in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_random_streams_belong_to_the_example_not_the_record(caches):
    records = packing.packed(caches[1], 32)
    loader = Loader([records], [1.0], _noisy(), batch_size=1)
    noise = {loader.example(i)["noise"].tobytes() for i in range(3 * len(records))}
    assert len(noise) == 3 * len(records)


def test_pairs_are_drawn_anew_each_epoch(caches):
    records = packing.pairs(caches[1], 64)
    loader = Loader(
        [records],
        [1.0],
        lambda pair, rng: {"label": pair["is_next"], "size": np.int32(len(pair["first"]))},
        batch_size=2,
    )
    seen = [tuple(int(v) for v in loader.example(i).values()) for i in range(3 * len(records))]
    assert seen == [tuple(int(v) for v in loader.example(i).values()) for i in range(3 * len(records))]
    assert 0.2 < np.mean([label for label, _ in seen]) < 0.8


def test_epochs_end_the_stream(caches):
    loader = _loader(caches, epochs=1.5)
    examples = len(packing.packed(caches[0], 32)) + len(packing.packed(caches[1], 32))
    assert loader.examples_per_epoch == examples and loader.steps == int(1.5 * examples) // 8
    assert len(list(loader.iterate(0))) == loader.steps
    assert len(list(loader.iterate(loader.steps - 1))) == 1 and not list(loader.iterate(loader.steps))
    assert _loader(caches).steps is None


def test_faults_name_the_field(caches):
    for more, words in (
        ({"batch_size": 8, "micro_batches": 3}, "batch_size=8 must be a positive multiple of micro_batches=3"),
        ({"rows": [8]}, "rows=.* 0 to 7"),
        ({"rows": []}, "rows="),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"epochs": 1e-3}, "epochs=0.001"),
    ):
        with pytest.raises(ValueError, match=words):
            _loader(caches, **more)


def test_unequal_shapes_are_an_error(caches):
    sizes = itertools.count(1)
    loader = Loader(
        [packing.packed(caches[0], 8)], [1.0], lambda record, rng: {"x": np.zeros(next(sizes))}, batch_size=2
    )
    with pytest.raises(ValueError, match=r"'x' has different shapes in one batch, \[\(1,\), \(2,\)\]"):
        loader.batch(0)


# ------------------------------------------------------------------------------------------- worker processes


def _failing(limit: int):
    def example(record, rng):
        if record["tokens"][0] > limit:
            raise ValueError("this record is no good")
        return record

    return example


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_a_worker_comes_through_as_its_one_line(caches, workers):
    loader = Loader([packing.packed(caches[0], 32)], [1.0], _failing(0), batch_size=4, workers=workers, seed=1)
    with pytest.raises(ValueError, match=r"^example \d+ \(part 0, record \d+\): this record is no good$"):
        list(loader.iterate(0))
    assert not _children()


RUN = """
import os, sys, time
from jaxlm.data import packing, token_cache
from jaxlm.data.loader import Loader

def example(record, rng):
    open(os.path.join(sys.argv[2], str(os.getpid())), "w").close()
    return record

if __name__ == "__main__":
    records = packing.packed(token_cache.open_cache(sys.argv[1]), 16)
    for batch in Loader([records], [1.0], example, batch_size=4, workers=2).iterate(0):
        print("batch", flush=True)
        time.sleep(0.01)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to watch processes")
@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_workers_end_with_their_run(caches, tmp_path, how):
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN))
    (tmp_path / "pids").mkdir()
    run = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", caches[0].path, tmp_path / "pids"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(5):
        assert run.stdout.readline() == "batch\n"
    workers = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert len(workers) == 2 and all(map(_alive, workers))
    if how == "ctrl-c":
        os.killpg(run.pid, signal.SIGINT)  # a terminal sends it to every process of the group
    else:
        run.kill()
    _, errors = run.communicate(timeout=20)
    assert errors.count("KeyboardInterrupt") == (1 if how == "ctrl-c" else 0), errors
    deadline = time.monotonic() + 10
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_alive, workers))


def test_the_data_floor_needs_no_jax():
    script = (
        "import sys; from jaxlm.data import loader, mixture, packing, sources, token_cache, tokenizer\n"
        "heavy = {'jax', 'grain', 'tensorflow', 'tensorflow_datasets', 'pyarrow', 'sentencepiece', 'rich'}\n"
        "print(heavy & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_evaluation_sees_every_record_once_in_order(caches, batch_size):
    records = packing.packed(caches[1], 32)
    batches = list(evaluation_batches(records, _noisy(), batch_size=batch_size))
    assert {batch["tokens"].shape for batch in batches} == {(1, batch_size, 33)}
    rows = np.concatenate([batch["tokens"][0] for batch in batches])
    assert np.array_equal(rows[: len(records)], [records[i]["tokens"] for i in range(len(records))])
    assert not any(leaf[0][len(records) - (len(batches) - 1) * batch_size :].any() for leaf in batches[-1].values())
    again = list(evaluation_batches(records, _noisy(), batch_size=batch_size))
    assert all(map(_same, batches, again))


def test_evaluation_rows_and_limit(caches):
    records = packing.packed(caches[1], 32)
    whole = list(evaluation_batches(records, _noisy(), batch_size=4, limit=6))
    part = list(evaluation_batches(records, _noisy(), batch_size=4, limit=6, rows=[1, 3]))
    assert len(whole) == len(part) == 2
    assert all(_same({n: leaf[:, [1, 3]] for n, leaf in w.items()}, p) for w, p in zip(whole, part, strict=True))
    assert not whole[1]["label"][0, 2:].any() and whole[1]["label"][0, :2].all()
    with pytest.raises(ValueError, match="nothing to evaluate"):
        next(evaluation_batches(records, _noisy(), batch_size=4, limit=0))


# -------------------------------------------------------------------------------------------------- on devices


def _mesh(**sizes):
    axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
    if len(jax.devices()) < np.prod(list(sizes.values())):
        pytest.skip(f"needs {np.prod(list(sizes.values()))} devices")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)


def test_to_device_on_one_process(caches):
    batch = _loader(caches, micro_batches=2).batch(0)
    plain = to_device(batch, None)
    mesh = _mesh(data=2, context=2)
    one = NamedSharding(mesh, P(None, "data", None))
    spread = to_device(batch, one, addressable_rows(one, 4))
    each = to_device(batch, {"tokens": one, "noise": one, "label": NamedSharding(mesh, P(None, "data"))})
    for placed in (plain, spread, each):
        assert all(
            np.array_equal(np.asarray(placed[name]), leaf.astype(placed[name].dtype)) for name, leaf in batch.items()
        )
    assert spread["tokens"].sharding.spec == P(None, "data", None)
    assert spread["label"].sharding.spec == P(None, "data")
    assert addressable_rows(one, 4) == addressable_rows(NamedSharding(mesh, P()), 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="batch of 3 rows does not divide"):
        addressable_rows(one, 3)


PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxlm.data.loader import addressable_rows, to_device
whole = {"tokens": np.arange(2 * 8 * 4).reshape(2, 8, 4), "label": np.arange(16).reshape(2, 8)}
# The second mesh deals out rows so that a process's are not next to each other.
devices = np.array(jax.devices())
for order, spec, want in (
    ([0, 1, 2, 3], P(None, "a", None), [range(4), range(4, 8)]),
    ([0, 2, 1, 3], P(None, "a", None), [(0, 1, 4, 5), (2, 3, 6, 7)]),
    ([0, 1, 2, 3], P(), [range(8), range(8)]),
):
    sharding = NamedSharding(jax.sharding.Mesh(devices[order], ("a",)), spec)
    rows = addressable_rows(sharding, 8)
    assert rows == list(want[int(sys.argv[2])]), rows
    placed = to_device({name: leaf[:, rows] for name, leaf in whole.items()}, sharding, rows)
    for name, leaf in placed.items():
        assert leaf.shape == whole[name].shape
        for shard in leaf.addressable_shards:
            assert np.array_equal(shard.data, whole[name][shard.index]), (name, shard)
print("ok")
"""


@pytest.mark.multiprocess
def test_to_device_on_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROCESS, str(port)]
    runs = [
        subprocess.Popen([*command, str(n)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    done = [run.communicate(timeout=60) for run in runs]
    assert [out.strip() for out, _ in done] == ["ok", "ok"], done
