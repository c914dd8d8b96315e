"""Tokenises a source once, stores it on disk, and opens it by memory map.

A cache folder `NAME-FINGERPRINT/` holds `train/` and perhaps `valid/`, each with `tokens.bin`, `offsets.bin`,
`raw_bytes.bin` and `index.json`. Finished shards wait in `parts/` until all are
finished, so that an interrupted run goes on.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxlm.data import sources
from jaxlm.data.spawn import script_hidden
from jaxlm.data.tokenizer import Tokenizer

VERSION = 2
BLOCK = 16 << 20


@dataclasses.dataclass(frozen=True)
class Cache:
    """An opened cache has every document as `[bos] + ids + [eos]` at `tokens[offsets[i]:offsets[i + 1]]`.

    A pair of texts is `[bos] + ids + [eos] + ids of the second + [eos]`.
    """

    path: Path
    tokens: np.memmap  # uint16 or uint32 [tokens]
    offsets: np.ndarray  # int64 [docs + 1]
    raw_bytes: np.ndarray  # int64 [docs], UTF-8 bytes of each document
    vocab_size: int
    tokenizer_fingerprint: str
    pad_id: int  # 0 where the vocabulary has none; segment 0 marks padding anyway
    notes: tuple[str, ...] = ()  # what a user should know of how the source was read

    def __len__(self) -> int:
        return len(self.raw_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the path alone: a pickled memory map would carry the whole corpus to another process."""
        return open_cache, (self.path, False)

    def document(self, i: int) -> np.ndarray:
        """Returns the tokens of document i, its bos and eos included."""
        return np.asarray(self.tokens[self.offsets[i] : self.offsets[i + 1]])


def open_cache(path: str | Path, verify: bool = True) -> Cache:
    """Opens one part of a prepared cache; `verify` reads all of it once and compares checksums.

    Raises ValueError, which names the file, if it is missing, damaged or of another version.
    """
    path = Path(path)
    remedy = f"delete {path.parent} and prepare the data again"
    try:
        index = json.loads((path / "index.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is no prepared token cache: run `jaxlm data prepare` first") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path / 'index.json'} is damaged ({error}): {remedy}") from error
    if index.get("version") != VERSION:
        raise ValueError(f"{path} has cache format {index.get('version')}, this version reads {VERSION}: {remedy}")
    for name, expected in index["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            raise ValueError(f"{file} is damaged: {size} bytes instead of {expected['bytes']}; {remedy}")
        if verify and _crc(file) != expected["crc32"]:
            raise ValueError(f"{file} is damaged: its checksum is wrong; {remedy}")
    return Cache(
        path,
        np.memmap(path / "tokens.bin", index["dtype"], "r"),
        np.fromfile(path / "offsets.bin", np.int64),
        np.fromfile(path / "raw_bytes.bin", np.int64),
        index["vocab_size"],
        index["tokenizer_fingerprint"],
        index["pad_id"],
        tuple(index["notes"]),
    )


def texts(source: str, *, field: sources.Field = "text", holdout: float = 0.0, part: str = "valid") -> Iterator[str]:
    """Yields the texts that a part of a cache was made of, in the cache's order: gzip and xz are compared on them."""
    if part not in ("train", "valid"):
        raise ValueError(f"part={part!r}: choose 'train' or 'valid'")
    shards = sources.shards(source, field=field)
    divide = sources.divides(shards, holdout)
    for shard in shards:
        for is_valid, document in sources.parts(shard, holdout, divide):
            if is_valid == (part == "valid"):
                yield from document.texts


def prepare(
    source: str,
    tokenizer: Tokenizer,
    root: str | Path,
    *,
    field: sources.Field = "text",
    holdout: float = 0.0,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Path]:
    """Tokenises `source` under `root` unless that is done; returns the folders of "train" and, with holdout, "valid".

    `workers` processes share the shards (0 or 1: this process does it all). Other runs that want the same cache wait.
    Raises ValueError if the tokenizer has no boundary tokens, a part is empty, or the folder can't be written.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} must be at least 0 and below 1")
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no token for document boundaries (bos, eos, cls or sep): choose another one"
        )
    shards = sources.shards(source, field=field)
    identity = [VERSION, source, field, holdout, tokenizer.fingerprint, [(s.stamp, s.start, s.stop) for s in shards]]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-40:]
    folder = Path(root).expanduser() / f"{name}-{fingerprint}"
    folders = {part: folder / part for part in ("train", "valid") if part == "train" or holdout > 0}
    if all((path / "index.json").is_file() for path in folders.values()):
        return folders
    with _clear_errors(folder), _locked(folder), _removed_if_refused(folder):
        if not all((path / "index.json").is_file() for path in folders.values()):
            divide = sources.divides(shards, holdout)
            _tokenise(shards, tokenizer, folder / "parts", (holdout, divide), workers, progress)
            for part in folders:
                _merge(folder, part, shards, tokenizer, source, divide)
            shutil.rmtree(folder / "parts")
    return folders


@contextlib.contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except concurrent.futures.process.BrokenProcessPool as error:
        remedy = "run again with fewer workers: finished parts are kept"
        raise ValueError(f"a tokenising process died, perhaps for want of memory; {remedy}") from error
    except OSError as error:
        cure = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make the folder writable"
        remedy = f"{cure} or choose another as data.cache, then run again: finished parts are kept"
        raise ValueError(f"can't write the token cache {folder}: {error.strerror or error}; {remedy}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one writer in at a time; the system releases the lock when the process dies."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else whoever held it has removed the folder
                yield
                return


@contextlib.contextmanager
def _removed_if_refused(folder: Path) -> Iterator[None]:
    """Removes the folder of data that can't be used: when they are mended, the folder has another name."""
    try:
        yield
    except ValueError:
        shutil.rmtree(folder)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        raise


def _write(path: Path, fill: Callable[[IO[bytes]], None]) -> None:
    """Writes a file under a temporary name until it's whole and on disk."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


# ---------------------------------------------------------------------------------------------- shard → part (workers)

_worker_settings: dict[str, Any] = {}  # what every shard of this worker process needs, sent once


Split = tuple[float, bool]
"""A split is (the share that is held out, whether documents are divided for it)."""


def _start_worker(tokenizer: Tokenizer, folder: Path, split: Split) -> None:
    _worker_settings.update(tokenizer=tokenizer, folder=folder, split=split)
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
        threading.Thread(target=_exit_with_parent, args=(parent.sentinel,), daemon=True).start()


def _exit_with_parent(sentinel: int) -> None:
    """Ends this worker when its parent ends: a killed parent can't stop it, and it would wait for work for ever."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _tokenise_shard(shard: sources.Shard) -> tuple[int, int, int]:
    """Writes the tokens of one shard; returns its counts of documents, bytes and tokens."""
    tokenizer, path = _worker_settings["tokenizer"], _part_file(_worker_settings["folder"], shard)
    ids: dict[bool, list[np.ndarray]] = {False: [], True: []}
    sizes: dict[bool, list[int]] = {False: [], True: []}
    left_out: list[str] = []
    holdout, divide = _worker_settings["split"]
    for is_valid, document in sources.parts(shard, holdout, divide, left_out):
        tokens = [tokenizer.bos_id]
        for text in document.texts:
            tokens += [*tokenizer.encode(text), tokenizer.eos_id]
        ids[is_valid].append(np.array(tokens, _dtype(tokenizer)))
        sizes[is_valid].append(sum(len(text.encode("utf-8")) for text in document.texts))
    arrays: dict[str, np.ndarray] = {}
    for is_valid, part in ((False, "train"), (True, "valid")):
        arrays[f"{part}_tokens"] = np.concatenate([np.zeros(0, _dtype(tokenizer)), *ids[is_valid]])
        arrays[f"{part}_lengths"] = np.array([len(x) for x in ids[is_valid]], np.int64)
        arrays[f"{part}_bytes"] = np.array(sizes[is_valid], np.int64)
    arrays["left_out"] = np.array([str(len(left_out)), *left_out[:1]])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    _write(path, lambda file: _write_all(file, buffer.getbuffer()))
    return len(sizes[False]) + len(sizes[True]), sum(sizes[False] + sizes[True]), sum(map(len, ids[False] + ids[True]))


def _write_all(file: IO[bytes], data: memoryview) -> None:
    file.write(data)


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _part_file(folder: Path, shard: sources.Shard) -> Path:
    return folder / f"{shard.name}.npz"


def _tokenise(
    shards: tuple[sources.Shard, ...], tokenizer: Tokenizer, folder: Path, split: Split, workers: int, progress: bool
) -> None:
    """Tokenises every shard whose part isn't in `folder` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in shards if not _part_file(folder, shard).is_file()]
    with _progress_bar(len(missing), progress) as advance, contextlib.ExitStack() as stack:
        if workers <= 1:
            _start_worker(tokenizer, folder, split)
            results: Iterator[tuple[int, int, int]] = map(_tokenise_shard, missing)
        else:
            # Spawned, not forked: JAX and the tokenizers run threads, and a fork would copy their locks.
            pool = concurrent.futures.ProcessPoolExecutor(
                min(workers, max(1, len(missing))),
                multiprocessing.get_context("spawn"),
                _start_worker,
                (tokenizer, folder, split),
            )
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            with script_hidden((tokenizer, missing)):
                futures = [pool.submit(_tokenise_shard, shard) for shard in missing]
            results = (future.result() for future in concurrent.futures.as_completed(futures))
        for counts in results:
            advance(*counts)


@contextlib.contextmanager
def _progress_bar(total: int, progress: bool) -> Iterator[Callable[[int, int, int], None]]:
    """Shows a progress bar on standard error if a person watches."""
    if not (progress and sys.stderr.isatty() and total):
        yield lambda documents, size, tokens: None
        return
    from rich import console
    from rich import progress as bars

    text = "{task.fields[documents]:,} documents  {task.fields[mb]:,.0f} MB  {task.fields[rate]:,.0f} tokens/s"
    columns = bars.TextColumn("tokenising"), bars.BarColumn(), bars.TextColumn(text), bars.TimeRemainingColumn()
    totals = [0, 0, 0]
    with bars.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, documents=0, mb=0.0, rate=0.0)

        def advance(*counts: int) -> None:
            totals[:] = [a + b for a, b in zip(totals, counts, strict=True)]
            rate = totals[2] / max(bar.tasks[0].elapsed or 0.0, 1e-9)
            bar.update(task, advance=1, documents=totals[0], mb=totals[1] / 1e6, rate=rate)

        yield advance


# ----------------------------------------------------------------------------------------------------- parts → a cache


def _merge(
    folder: Path, part: str, shards: tuple[sources.Shard, ...], tokenizer: Tokenizer, source: str, divided: bool
) -> None:
    """Joins the parts of a source in shard order into `folder/part`, which appears all at once."""
    if (folder / part / "index.json").is_file():
        return
    building = folder / f"{part}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    lengths, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    left_out: list[list[str]] = []

    def write_tokens(file: IO[bytes]) -> None:
        for shard in shards:
            with np.load(_part_file(folder / "parts", shard), allow_pickle=False) as arrays:
                file.write(arrays[f"{part}_tokens"].data)
                lengths.append(arrays[f"{part}_lengths"])
                sizes.append(arrays[f"{part}_bytes"])
                left_out.append(arrays["left_out"].tolist())

    _write(building / "tokens.bin", write_tokens)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    raw = np.concatenate(sizes)
    if not len(raw):
        shutil.rmtree(building)
        remedy = (
            "raise holdout, name validation data, or give more text"
            if part == "valid"
            else "name one with text, or lower holdout"
        )
        raise ValueError(f"{source}: the corpus is empty: not one document fell to {part!r}; {remedy}")
    notes = []
    if divided and part == "valid":
        notes.append(f"{source}: no whole document falls to validation; {len(raw):,} pieces are held out of them, "
                     f"{int(raw.sum()):,} bytes")  # fmt: skip
    if (n := sum(int(count) for count, *_ in left_out)) and part == "train":
        first = next(place for _, place in filter(lambda x: len(x) == 2, left_out))
        notes.append(f"{source}: {n:,} pairs are left out, for one of their texts is empty (first: {first})")
    _write(building / "offsets.bin", lambda file: _write_all(file, offsets.data))
    _write(building / "raw_bytes.bin", lambda file: _write_all(file, raw.data))
    index = {
        "version": VERSION,
        "documents": len(raw),
        "tokens": int(offsets[-1]),
        "raw_bytes": int(raw.sum()),
        "skipped_files": sum(shard.skipped for shard in shards),
        "dtype": np.dtype(_dtype(tokenizer)).name,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id or 0,
        "notes": notes,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "files": {
            file.name: {"bytes": file.stat().st_size, "crc32": _crc(file)} for file in sorted(building.glob("*.bin"))
        },
    }
    _write(building / "index.json", lambda file: _write_all(file, memoryview(json.dumps(index, indent=2).encode())))
    building.rename(folder / part)
