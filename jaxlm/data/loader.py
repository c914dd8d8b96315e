"""A batch is a pure function of (seed, step): hosts and workers change who computes a row, never what it holds."""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.data.mixture import Mixture, mixture, shuffled
from jaxlm.data.packing import DrawnRecords, Records
from jaxlm.data.spawn import script_hidden

if TYPE_CHECKING:
    import jax

Arrays = dict[str, np.ndarray]
ToExample = Callable[[Any, np.random.Generator], Mapping[str, Any]]


def _generator(seed: int, i: int) -> np.random.Generator:
    """Returns a random generator of its own for each (seed, example)."""
    return np.random.Generator(np.random.Philox(key=(seed << 64) | i))


def record(records: Records, i: int, rng: np.random.Generator) -> Any:
    """Returns record i; `rng` is for records that are drawn."""
    return records.draw(i, rng) if isinstance(records, DrawnRecords) else records[i]


class Loader:
    """A loader makes training batches, whose leaves are [micro, rows, …].

    `rows` are those of each micro batch that this process needs. Example `step * batch_size + micro * (batch_size //
    micro_batches) + row` is the one at [micro, row] of a step. `added` gives further leaves of a step's batch.
    `to_example` must be picklable if workers > 0, and
    return arrays of the same shapes for every record. Raises ValueError, which names the argument, if one is out of its
    range.
    """

    def __init__(
        self,
        parts: Sequence[Records],
        weights: Sequence[float],
        to_example: ToExample,
        *,
        batch_size: int,
        micro_batches: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        rows: Sequence[int] | None = None,
        workers: int = 0,
        prefetch: int = 2,
        epochs: float | None = None,
        added: Callable[[int], Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        if batch_size < 1 or micro_batches < 1 or batch_size % micro_batches:
            raise ValueError(f"batch_size={batch_size} must be a positive multiple of micro_batches={micro_batches}")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed={seed} must be at least 0 and below 2**63")
        if workers < 0 or prefetch < 1:
            raise ValueError(f"workers={workers} must be at least 0 and prefetch={prefetch} at least 1")
        self.mixture: Mixture = mixture(parts, weights)
        self.to_example = to_example
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self.seed, self.shuffle = seed, shuffle
        per_micro = batch_size // micro_batches
        self.rows = list(range(per_micro)) if rows is None else [int(row) for row in rows]
        if not self.rows or not all(0 <= row < per_micro for row in self.rows):
            raise ValueError(f"rows={self.rows} must name rows 0 to {per_micro - 1} of a micro batch")
        self.workers, self.prefetch = workers, prefetch
        self.epochs, self.added = epochs, added
        if self.steps is not None and self.steps < 1:
            raise ValueError(
                f"epochs={epochs} of {self.examples_per_epoch} examples are less than one batch of {batch_size}"
            )

    @property
    def examples_per_epoch(self) -> int:
        """Returns the number of records of all parts that have a weight. Small parts of a mixture repeat more often."""
        used = zip(self.mixture.parts, self.mixture.shares, strict=True)
        return sum(len(part) for part, share in used if share > 0)

    @property
    def steps(self) -> int | None:
        """Returns the number of whole batches in `epochs`, or None without that limit."""
        return None if self.epochs is None else int(self.epochs * self.examples_per_epoch) // self.batch_size

    def state(self, step: int) -> dict[str, int]:
        """Returns all that is needed to go on at `step`."""
        return {"seed": self.seed, "index": step * self.batch_size}

    def indices(self, step: int) -> np.ndarray:
        """Returns the global indices of the examples in this process's rows: int64 [micro, rows]."""
        per_micro = self.batch_size // self.micro_batches
        starts = step * self.batch_size + per_micro * np.arange(self.micro_batches)
        return starts[:, None] + np.array(self.rows)

    def place(self, i: int) -> tuple[int, int]:
        """Returns the part and the record that the i-th example since the start of training is made of."""
        part, counter = self.mixture.locate(i)
        records = self.mixture.parts[part]
        epoch, index = divmod(counter, len(records))
        if self.shuffle:
            index = shuffled(index, len(records), self.seed << 16 | part, epoch)  # parts are shuffled independently
        return part, index

    def record(self, i: int) -> tuple[Any, np.random.Generator]:
        """Returns the record of the i-th example since the start of training, and the random generator that the example
        is made with."""
        part, index = self.place(i)
        rng = _generator(self.seed, i)
        return record(self.mixture.parts[part], index, rng), rng

    def example(self, i: int) -> Mapping[str, Any]:
        """Returns the i-th example since the start of training. ValueErrors name the example, part and record."""
        part, index = self.place(i)
        try:
            return self.to_example(*self.record(i))
        except ValueError as error:
            raise ValueError(f"example {i} (part {part}, record {index}): {error}") from error

    def batch(self, step: int) -> Arrays:
        """Returns the batch of a step, with leaves [micro, rows, …]."""
        indices = self.indices(step)
        batch = _stack([self.example(int(i)) for i in indices.flat], indices.shape)
        return batch if self.added is None else batch | dict(self.added(step))

    def iterate(self, start_step: int = 0) -> Iterator[Arrays]:
        """Yields batches from `start_step` on, made ahead by a thread or by worker processes; close it to stop them."""
        import grain

        stop = sys.maxsize if self.steps is None else self.steps
        if start_step >= stop:
            return
        threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.prefetch)
        data = grain.MapDataset.source(_Steps(self, start_step, stop)).to_iter_dataset(threads)
        if self.workers:
            from absl import flags

            # Grain reads a flag of its own, which raises unless absl has parsed the command line.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=self.prefetch)
            data = data.mp_prefetch(options, worker_init_fn=_start_worker)
            # Batches travel through pipes: shared memory runs out in containers, and stays behind when a run is killed.
            data = grain.experimental.WithOptionsIterDataset(
                data, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            )
        iterator = iter(data)
        try:
            # workers start with the first batch
            with script_hidden(self.to_example) if self.workers else contextlib.nullcontext():
                first = next(iterator)
            yield first
            yield from iterator
        except ValueError as error:  # Grain adds lines about itself to what the user has to read
            raise ValueError(str(error).partition("\n-----")[0]) from error
        finally:
            iterator.close()


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Presents steps as the random-access source that Grain reads."""

    loader: Loader
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, k: int) -> Arrays:
        return self.loader.batch(self.start + k)


def _start_worker(index: int, count: int) -> None:
    """Leaves Ctrl-C to the main process, and ends the worker with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()


def _exit_with_parent(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _stack(examples: list[Mapping[str, Any]], leading: tuple[int, ...]) -> Arrays:
    names = examples[0].keys()
    for example in examples:
        if example.keys() != names:
            raise ValueError(f"examples of one batch differ: {sorted(names)} and {sorted(example)}")
    batch = {}
    for name in names:
        try:
            leaf = np.stack([example[name] for example in examples])
        except ValueError as error:
            shapes = sorted({np.shape(example[name]) for example in examples})
            raise ValueError(
                f"{name!r} has different shapes in one batch, {shapes}: pad or pack to one length"
            ) from error
        batch[name] = leaf.reshape(*leading, *leaf.shape[1:])
    return batch


def evaluation_batches(
    records: Records,
    to_example: ToExample,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    limit: int | None = None,
) -> Iterator[Arrays]:
    """Yields every record once, in order, in batches with leaves [1, rows, …].

    Rows past the end are zeros, so they weigh nothing. `limit` caps the number of records. Randomness depends on the
    record alone, so that each evaluation sees the same examples. Raises ValueError if there is nothing to evaluate.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    total = len(records) if limit is None else min(limit, len(records))
    if not total:
        raise ValueError("nothing to evaluate: there are no records, or limit=0")
    rows = range(batch_size) if rows is None else rows
    blank: Arrays | None = None
    for start in range(0, total, batch_size):
        indices = [start + row for row in rows]
        if blank is None and any(i >= total for i in indices):
            blank = {name: np.zeros_like(value) for name, value in _evaluated(records, to_example, 0).items()}
        examples = [_evaluated(records, to_example, i) if i < total else blank for i in indices]
        yield _stack(examples, (1, len(indices)))  # type: ignore[arg-type]


def evaluation_rows(records: Records, to_example: ToExample, indices: Sequence[int]) -> Arrays:
    """Returns the rows of some records, with leaves [1, indices, …], as every evaluation sees them."""
    return _stack([_evaluated(records, to_example, i) for i in indices], (1, len(indices)))


def _evaluated(records: Records, to_example: ToExample, i: int) -> Mapping[str, Any]:
    rng = _generator(0, i)
    return to_example(record(records, i, rng), rng)


# -------------------------------------------------------------------------------------------------------- onto devices


def addressable_rows(sharding: "jax.sharding.Sharding", batch: int) -> list[int]:
    """Returns the sorted rows of axis 1 (the batch) that this process's devices hold.

    Raises ValueError if the batch doesn't divide over the mesh.
    """
    shape = _divisible_shape(sharding, batch)
    try:
        slices = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise ValueError(
            f"a batch of {batch} rows does not divide over the mesh axes of its sharding {sharding}"
        ) from error
    return sorted({row for index in slices.values() if index is not None for row in range(batch)[index[1]]})


def _divisible_shape(sharding: "jax.sharding.Sharding", batch: int) -> tuple[int, ...]:
    """Returns a shape with `batch` as axis 1, whose other axes divide over any mesh."""
    # Only a NamedSharding has a spec.
    rank = max(2, len(getattr(sharding, "spec", ())))
    return tuple(batch if axis == 1 else sharding.num_devices for axis in range(rank))


def to_device(
    batch: Mapping[str, np.ndarray],
    shardings: "Mapping[str, jax.sharding.Sharding] | jax.sharding.Sharding | None",
    rows: Sequence[int] | None = None,
) -> "dict[str, jax.Array]":
    """Returns global arrays [micro, batch, …] that are made of this process's rows.

    A single sharding serves leaves of lower rank too. `rows` says which rows of the global batch these are, as
    `addressable_rows` returned them (None: all of them).
    """
    import jax

    if shardings is None:
        return jax.device_put(dict(batch))
    return {
        name: _to_global(jax, leaf, shardings[name] if isinstance(shardings, Mapping) else shardings, rows)
        for name, leaf in batch.items()
    }


def _to_global(jax: Any, leaf: np.ndarray, sharding: Any, rows: Sequence[int] | None) -> "jax.Array":
    spec = getattr(sharding, "spec", None)
    if spec is not None and len(spec) > leaf.ndim:
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec[: leaf.ndim]))
    if rows is None or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # The size of the global batch follows from the share of a batch of `num_devices` rows that lies on this process.
    devices = sharding.num_devices
    size = len(rows) * devices // len(addressable_rows(sharding, devices))
    position = {row: k for k, row in enumerate(rows)}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        mine = [position[row] for row in range(size)[index[1]]]
        return leaf[index[0]][:, mine][(slice(None), slice(None), *index[2:])]

    return jax.make_array_from_callback((leaf.shape[0], size, *leaf.shape[2:]), sharding, shard)
