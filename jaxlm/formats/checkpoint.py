"""A checkpoint is the whole state and its meta data in one atomic step, written while training goes on.

`checkpoint-<step>/` holds one Orbax item for each part of the state (`params/`, `opt/`, …; single arrays such as the
step and the key lie together in `rest/`), `meta/` and `metrics/` as JSON, and `manifest.json` with size and CRC-32 of
every file. The trees are plain nested dicts: `orbax.checkpoint.StandardCheckpointer().restore(".../params")` opens it.
A step appears under its name by one rename, manifest included; a killed process leaves only a `*-tmp` folder behind.
"""

import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint._src.metadata.array_metadata_store import Store  # without it random keys come back as numbers

from jaxlm.core import tree
from jaxlm.core.errors import FAULTS, one_line
from jaxlm.formats.checkpoint_tree import MismatchError, check_same, described, nested, structured_like, with_sharding
from jaxlm.formats.manifest import MANIFEST, damage, write_manifest

NAME = re.compile(r"checkpoint-(\d+)")
TEMPORARY = re.compile(r"checkpoint-\d+\.(orbax-checkpoint-tmp|deleted)")
SPLIT = 1 << 20  # bytes from which the replicas of an array share its writing: each cut is a program to compile


class Checkpoints:
    """This object saves and restores the checkpoints of one run.

    In a run of several processes every process makes the same calls in the same order.

    keep: how many of the newest to keep. keep_best: whether to keep the one with the lowest `best_metric` too.
    every: the cadence that `due(step)` answers for. timeout_s: bound on a save in the background and on every barrier.
    file_each: write each array to files of its own, whose names and bytes depend on its numbers alone, instead of a
    database, which has random names and times in it; both are read alike.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        keep_best: bool = True,
        best_metric: str = "valid/score",
        every: int = 1,
        timeout_s: int = 1200,
        file_each: bool = False,
    ):
        for name, value in (("keep", keep), ("every", every), ("timeout_s", timeout_s)):
            if value < 1:
                raise ValueError(f"checkpoint {name} = {value}: must be at least 1")
        self.folder = Path(folder).absolute()
        self.step: int | None = None  # the step last restored or saved by this object
        self._keep, self._keep_best, self._best_metric, self._every = keep, keep_best, best_metric, every
        self._timeout_s, self._file_each = timeout_s, file_each
        self._saver: ocp.AsyncCheckpointer | None = None
        self._items: tuple[str, ...] = ()
        self._saving: int | None = None
        self._swept = False
        self._faults: dict[int, str] = {}  # steps found damaged by this object

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- which steps exist

    def steps(self) -> list[int]:
        """Returns the committed steps, ascending, damaged ones included: only a restore reads the files."""
        if not self.folder.is_dir():
            return []
        matches = (NAME.fullmatch(p.name) for p in self.folder.iterdir())
        return sorted(int(m[1]) for m in matches if m)

    def latest(self) -> int | None:
        """Returns the newest committed step, None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the lowest `best_metric`, the newer one on a tie, None if no step has that metric."""
        scored = [(score, -step) for step in self.steps() if (score := self._score(step)) is not None]
        return -min(scored)[1] if scored else None

    def due(self, step: int) -> bool:
        """Says whether a checkpoint is due at `step`: at each `every`-th one."""
        return step % self._every == 0

    def path(self, step: int) -> Path:
        """Returns the folder of a step."""
        return self.folder / f"checkpoint-{step}"

    # ---- save

    def save(
        self, step: int, state: Any, meta: dict, *, metrics: Mapping[str, float] | None = None, wait: bool = False
    ) -> bool:
        """Copies `state` to host memory, returns, and writes it in the background; False if this step exists already.

        Raises what went wrong with the save before this one (or this one if `wait`) as ValueError in one line.
        """
        self.wait()
        if step == self.step:
            return False
        items = nested(state)
        json_items = {"meta": _json(meta, "meta"), "metrics": _json(dict(metrics or {}), "metrics")}
        self._make_room(step)
        saver = self._saver_for((*items, *json_items))
        arguments = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        arguments |= {name: ocp.args.JsonSave(value) for name, value in json_items.items()}
        self._saving = step
        try:
            saver.save(self.path(step), args=ocp.args.Composite(**arguments))
        except Exception as error:
            self._give_up(error)
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Waits until the save in the background is committed and deletes old steps; raises the save's error."""
        if self._saver is None or self._saving is None:
            return
        try:
            self._saver.wait_until_finished()
        except Exception as error:
            self._give_up(error)
        self.step, self._saving = self._saving, None
        if jax.process_index() == 0:
            self._delete_old()

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        try:
            self.wait()
        finally:
            self._close_saver()

    # ---- restore

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """Restores (state, meta) of `step`, or of the newest sound step, straight to the shards of `abstract_state`.

        abstract_state: leaves are `jax.ShapeDtypeStruct(shape, dtype, sharding=…)` on whatever mesh there is now.
        Raises ValueError if `step` is damaged or missing, if none is left, or if a name, shape or dtype differs.
        """
        wanted = nested(abstract_state)

        def read(at: int) -> tuple[dict, dict]:
            self._check_items(at, wanted)
            trees = {name: self._read(at, name, tree, cast=False) for name, tree in wanted.items()}
            return trees, self._read_json(at, "meta")

        trees, meta = self._first_sound(step, (*wanted, "meta", "metrics"), read, remember=True)
        return structured_like(abstract_state, trees), meta

    def restore_params(
        self, abstract_params: Any, step: int | None = None, *, item: str = "params", partial: bool = False
    ) -> Any:
        """Restores the weights alone, cast to the dtypes of `abstract_params`; no other file is read.

        item: the part of the state that holds them, or a path into it such as `opt/ema`. partial: the part may hold
        others too, as it may where a path is given.
        """
        partial = partial or "/" in item
        name, *inner = item.split("/")
        wanted = nested(abstract_params, whole=True)
        for key in reversed(inner):
            wanted = {key: wanted}
        tree = self._first_sound(step, (name,), lambda at: self._read(at, name, wanted, cast=True, partial=partial))
        for key in inner:
            tree = tree[key]
        return structured_like(abstract_params, tree, whole=True)

    def each_param(self, abstract_params: Any, step: int | None = None, *, item: str = "params") -> Iterator[Any]:
        """Yields (path, weight) of the weights, cast as `restore_params` does, one after the other: one is held."""
        at = self._first_sound(step, (item,), lambda at: at)
        for path, leaf in tree.flatten(nested(abstract_params, whole=True)).items():
            yield path, tree.at(self._read(at, item, tree.put({}, path, leaf), cast=True, partial=True), path)

    def described(self, step: int | None = None, *, item: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and dtype of each array of an item of `step`, or of the newest, by path; nothing where there is
        no such item."""
        at = self.latest() if step is None else step
        if at is None or not (self.path(at) / item).is_dir():
            return {}
        return {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in described(self.path(at) / item).items()}

    def read_meta(self, step: int | None = None) -> dict:
        """Reads the meta data of `step`, or of the newest step whose meta data is sound."""
        return self._first_sound(step, ("meta",), lambda at: self._read_json(at, "meta"))

    def damage(self, step: int, items: tuple[str, ...] | None = None) -> str | None:
        """Says what is wrong with the files of a step, or of some items of it, by its manifest; None if nothing is.

        It reads every byte of them. A step without a manifest (another program wrote it) counts as sound here.
        """
        return damage(self.path(step), items)

    # ---- inside: saving

    def _saver_for(self, items: tuple[str, ...]) -> ocp.AsyncCheckpointer:
        if items != self._items:
            self._close_saver()
        if self._saver is None:
            # Named processes make Orbax use barriers with a time limit instead of an unbounded collective.
            processes = ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count())), barrier_sync_key_prefix="jaxlm"
            )
            arrays = ocp.type_handlers.ArrayHandler(
                min_slice_bytes_for_replica_parallel=SPLIT, array_metadata_store=Store()
            )
            known = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
            handlers = {
                name: ocp.JsonCheckpointHandler(multiprocessing_options=processes)
                if name in ("meta", "metrics")
                else ocp.PyTreeCheckpointHandler(
                    type_handler_registry=known, multiprocessing_options=processes, use_ocdbt=not self._file_each
                )
                for name in items
            }
            self._saver = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(
                    composite_options=ocp.CompositeOptions(multiprocessing_options=processes), **handlers
                ),
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=self._timeout_s,
                    post_finalization_callback=self._write_manifest,
                    # Otherwise a folder that can't be made leaves a thread behind that keeps the process alive.
                    create_directories_asynchronously=False,
                ),
                multiprocessing_options=processes,
            )
            self._items = items
            logging.getLogger("absl").addFilter(_not_raised_by_wait)
        return self._saver

    def _close_saver(self) -> None:
        if self._saver is not None:
            self._saver.close()
            self._saver = None
            logging.getLogger("absl").removeFilter(_not_raised_by_wait)

    def _write_manifest(self) -> None:
        """Runs on process 0 in Orbax's thread, after all processes wrote their files, before the step is renamed."""
        step = self._saving
        assert step is not None
        final = self.path(step)
        write_manifest(next(p for p in (final.with_name(final.name + ".orbax-checkpoint-tmp"), final) if p.is_dir()))

    def _make_room(self, step: int) -> None:
        """Tidies the folder on process 0; if that fails, it raises on every process: none waits for the others."""
        fault: ValueError | None = None
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self._swept:
                    self._sweep()
                self._set_aside(step)
            except OSError as error:
                fault = ValueError(self._explain(error, step))
                fault.__cause__ = error
            except ValueError as error:
                fault = error
        if not _all_agree(fault is None):
            raise fault or ValueError(f"checkpoint at step {step} was not saved: process 0 says why")

    def _sweep(self) -> None:
        """Removes what killed processes left."""
        for path in self.folder.iterdir():
            if TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path)
        self._swept = True

    def _set_aside(self, step: int) -> None:
        """Renames steps that this run went back to before; refuses to write among the steps of another run."""
        for other in self.steps():
            if other < step and other not in self._faults:
                continue
            if other not in self._faults and (self.step is None or other <= self.step):
                raise ValueError(
                    f"{self.folder} already has checkpoint-{other}, not older than step {step}, which this run has not"
                    " continued from: continue it, or choose another folder"
                )
            aside = _free_name(self.path(other).with_name(f"checkpoint-{other}.aside"))
            self.path(other).rename(aside)
            why = self._faults.pop(other, f"the run went back to step {self.step}")
            _say(f"checkpoint-{other} is set aside as {aside.name}: {why}")

    def _give_up(self, error: Exception) -> None:
        """Frees the space of a failed save and raises why in one line; an unknown error is raised as it is."""
        step, self._saving = self._saving, None
        assert step is not None
        if jax.process_index() == 0:
            # What can't be removed now (the disk may be gone) is swept by the next process that saves here.
            shutil.rmtree(f"{self.path(step)}.orbax-checkpoint-tmp", ignore_errors=True)
        if isinstance(error, TimeoutError):
            reason = f"not done in {self._timeout_s} s: the disk is too slow or another process has failed"
            raise ValueError(f"checkpoint at step {step} was not saved: {reason}; {self._remaining()}") from error
        if _errno_of(error) is None:
            raise error
        raise ValueError(self._explain(error, step)) from error

    def _explain(self, error: Exception, step: int) -> str:
        reason = FAULTS.get(_errno_of(error) or 0, str(error))
        return f"checkpoint at step {step} was not saved to {self.folder}: {reason}; {self._remaining()}"

    def _remaining(self) -> str:
        try:
            newest = self.latest()
        except OSError:  # the folder itself can't be listed; the reason is already in the message
            newest = None
        return "there is no earlier checkpoint" if newest is None else f"earlier ones are intact, newest: {newest}"

    def _delete_old(self) -> None:
        steps = self.steps()
        retained = {*steps[-self._keep :], *([self.best()] if self._keep_best else [])}
        for step in steps:
            if step not in retained:
                # Renamed first: a half-deleted folder must never look like a checkpoint.
                doomed = self.path(step).with_name(f"checkpoint-{step}.deleted")
                self.path(step).rename(doomed)
                shutil.rmtree(doomed)

    def _score(self, step: int) -> float | None:
        path = self.path(step) / "metrics" / "metadata"
        try:
            value = json.loads(path.read_text())[self._best_metric]
        except (OSError, ValueError, KeyError):  # saved without this metric, or damaged: it can't be the best
            return None
        return value if isinstance(value, int | float) and not math.isnan(value) else None

    # ---- inside: restoring

    def _first_sound(self, step: int | None, items: tuple[str, ...], read: Any, *, remember: bool = False) -> Any:
        """Returns `read(step)` of the step asked for, or of the newest one that passes its checksums and is read."""
        self.wait()
        while True:
            at = self._choose(step, items)
            checked = (self.path(at) / MANIFEST).is_file()
            result, error = None, None
            try:
                result = read(at)
            except MismatchError:
                raise
            except Exception as failure:
                error = failure
            if _all_agree(error is None):
                if remember:
                    self.step = at
                return result
            if checked:  # the bytes are what was saved, so the fault lies elsewhere (memory, devices): don't hide it
                raise error or ValueError(f"another process could not read {self.path(at)}")
            self._faults[at] = f"it has no {MANIFEST} and can't be read ({one_line(error, 200)})"
            if step is not None:
                raise ValueError(f"{self.path(at)} is damaged: {self._faults[at]}") from error

    def _choose(self, step: int | None, items: tuple[str, ...]) -> int:
        """Returns the step that process 0 decides on for all; it prints why a newer step is passed over."""
        chosen, message = -1, "process 0 found no sound checkpoint and says why"
        if jax.process_index() == 0:
            chosen, message = self._newest_sound(step, items)
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        if chosen < 0:
            raise ValueError(message)
        return chosen

    def _newest_sound(self, step: int | None, items: tuple[str, ...]) -> tuple[int, str]:
        """Returns (step, ""), or (-1, why there is none)."""
        existing = self.steps()
        if step is not None and step not in existing:
            have = ", ".join(map(str, existing)) or "none"
            return -1, f"{self.folder} has no checkpoint at step {step} (there: {have})"
        skipped: list[int] = []
        for at in [step] if step is not None else reversed(existing):
            fault = self._faults.get(at) or damage(self.path(at), items)
            if fault is None:
                for bad in skipped:
                    _say(f"WARNING: checkpoint-{bad} is damaged: {self._faults[bad]}; checkpoint-{at} is used instead")
                if not (self.path(at) / MANIFEST).is_file():
                    _say(f"checkpoint-{at} has no {MANIFEST}: it is used without a check of its files")
                return at, ""
            self._faults[at] = fault
            skipped.append(at)
        if step is not None:
            return -1, f"{self.path(step)} is damaged: {self._faults[step]}"
        if not existing:
            return -1, f"{self.folder} has no checkpoint"
        faults = "; ".join(f"checkpoint-{bad}: {self._faults[bad]}" for bad in skipped)
        return -1, f"{self.folder} has no checkpoint that is sound ({faults})"

    def _check_items(self, step: int, wanted: dict) -> None:
        stored = {p.name for p in self.path(step).iterdir() if p.is_dir()} - {"meta", "metrics"}
        if stored != set(wanted):
            raise MismatchError(
                f"{self.path(step)} holds the parts {sorted(stored)} but the run needs {sorted(wanted)}: its"
                " config differs from the one that the checkpoint was saved with"
            )

    def _read(self, step: int, item: str, wanted: dict, *, cast: bool, partial: bool = False) -> dict:
        """Reads one item, each leaf to its sharding. Names, shapes and (unless `cast`) dtypes are compared first."""
        path = self.path(step) / item
        if not path.is_dir():
            raise MismatchError(f"{self.path(step)} has no part named {item!r}")
        handler = ocp.PyTreeCheckpointHandler()
        check_same(path, described(path), wanted, cast=cast, partial=partial)
        wanted = jax.tree.map(with_sharding, wanted)
        arguments = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=partial,
        )
        return handler.restore(path, args=arguments)

    def _read_json(self, step: int, item: str) -> dict:
        return json.loads((self.path(step) / item / "metadata").read_text())


def abstract(state: Any, shardings: Any = None) -> Any:
    """Returns `jax.ShapeDtypeStruct` leaves for `restore`, with the arrays' own shardings or with `shardings`."""
    if shardings is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _all_agree(fine: bool) -> bool:
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.int32(fine))))


def _json(value: dict, name: str) -> dict:
    """Converts a value before anything is written: Orbax would fail in its thread, after training has moved on."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {name} is not JSON: {error}") from error


def _errno_of(error: BaseException | None) -> int | None:
    """Returns the errno behind an exception. Tensorstore puts it into the text of a ValueError."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FAULTS:
            return error.errno
        for code in FAULTS:
            if os.strerror(code) in str(error):
                return code
        error = error.__cause__ or error.__context__
    return None


def _not_raised_by_wait(record: logging.LogRecord) -> bool:
    """Drops from the log the tracebacks of Orbax's threads when a save fails, as `wait` raises the same error, and that
    there is no database to merge where none was asked for."""
    ours = "orbax" in record.pathname
    return not (ours and (record.exc_info or "Skipping merge of OCDBT" in record.getMessage()))


def _free_name(path: Path) -> Path:
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        if not (candidate := path.with_name(path.name + suffix)).exists():
            return candidate
    raise ValueError(f"too many folders named {path.name}* in {path.parent}: delete some")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
