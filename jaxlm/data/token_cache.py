"""Tokenise a source once, keep it on disk, open it by memory map.

A cache folder `NAME-FINGERPRINT/` holds `train/` and perhaps `valid/`, each with `tokens.bin`, `offsets.bin`,
`raw_bytes.bin` and `index.json`. Finished shards rest in `parts/` until all are there, so an interrupted run goes on.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
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
from jaxlm.data.tokenizer import Tokenizer

VERSION = 1
BLOCK = 16 << 20


@dataclasses.dataclass(frozen=True)
class Cache:
    """An opened cache: every document is `[bos] + ids + [eos]` at `tokens[offsets[i]:offsets[i + 1]]`.

    Where documents are pairs of texts, `[bos] + ids + [eos] + ids of the second + [eos]`.
    """

    path: Path
    tokens: np.memmap  # uint16 or uint32 [tokens]
    offsets: np.ndarray  # int64 [docs + 1]
    raw_bytes: np.ndarray  # int64 [docs], UTF-8 bytes of each document
    vocab_size: int
    tokenizer_fingerprint: str
    pad_id: int  # 0 where the vocabulary has none; segment 0 marks padding anyway

    def __len__(self) -> int:
        return len(self.raw_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process goes the path: a pickled memory map would carry the whole corpus."""
        return open_cache, (self.path, False)

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, its bos and eos included."""
        return np.asarray(self.tokens[self.offsets[i] : self.offsets[i + 1]])


def open_cache(path: str | Path, verify: bool = True) -> Cache:
    """Open one part of a prepared cache; `verify` reads all of it once and compares checksums."""
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
    for name, want in index["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != want["bytes"]:
            raise ValueError(f"{file} is damaged: {size} bytes instead of {want['bytes']}; {remedy}")
        if verify and _crc(file) != want["crc32"]:
            raise ValueError(f"{file} is damaged: its checksum is wrong; {remedy}")
    return Cache(
        path,
        np.memmap(path / "tokens.bin", index["dtype"], "r"),
        np.fromfile(path / "offsets.bin", np.int64),
        np.fromfile(path / "raw_bytes.bin", np.int64),
        index["vocab_size"],
        index["tokenizer_fingerprint"],
        index["pad_id"],
    )


def texts(source: str, *, field: sources.Field = "text", holdout: float = 0.0, part: str = "valid") -> Iterator[str]:
    """The very texts behind a cache's part, in the cache's order: what gzip or xz is compared on."""
    if part not in ("train", "valid"):
        raise ValueError(f"part={part!r}: choose 'train' or 'valid'")
    for document in sources.documents(source, field=field):
        if sources.held_out(document.key, holdout) == (part == "valid"):
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
    """Tokenise `source` under `root` unless it's there; gives the folders of "train" and, with holdout, "valid".

    `workers` processes share the shards (0 or 1: this process does it all). Others that want the same cache wait.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} must be at least 0 and below 1")
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no token for document boundaries (bos, eos, cls or sep): choose another one"
        )
    cuts = sources.shards(source, field=field)
    defines = [VERSION, source, field, holdout, tokenizer.fingerprint, [(s.stamp, s.start, s.stop) for s in cuts]]
    fingerprint = hashlib.sha256(json.dumps(defines).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-40:]
    folder = Path(root).expanduser() / f"{name}-{fingerprint}"
    done = {part: folder / part for part in ("train", "valid") if part == "train" or holdout > 0}
    if all((path / "index.json").is_file() for path in done.values()):
        return done
    with _clear_errors(folder), _locked(folder):
        if not all((path / "index.json").is_file() for path in done.values()):
            _tokenise(cuts, tokenizer, folder / "parts", holdout, workers, progress)
            for part in done:
                _merge(folder, part, cuts, tokenizer, source)
            shutil.rmtree(folder / "parts")
    return done


@contextlib.contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except concurrent.futures.process.BrokenProcessPool as error:
        remedy = "run again with fewer workers: finished parts are kept"
        raise ValueError(f"a tokenising process died, perhaps for want of memory; {remedy}") from error
    except OSError as error:
        remedy = "free space or choose another folder, then run again: finished parts are kept"
        raise ValueError(f"can't write the token cache {folder}: {error.strerror or error}; {remedy}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the system lets go of the lock when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, fill: Callable[[IO[bytes]], None]) -> None:
    """Under a temporary name until it's whole and on disk."""
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

_work: dict[str, Any] = {}  # what every shard of this worker process needs, sent once


def _start_worker(tokenizer: Tokenizer, folder: Path, holdout: float) -> None:
    _work.update(tokenizer=tokenizer, folder=folder, holdout=holdout)
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    """A killed parent can't stop its workers; without this they would wait for work for ever."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _tokenise_shard(shard: sources.Shard) -> tuple[int, int, int]:
    """Write one part; gives its documents, bytes and tokens."""
    tokenizer, path = _work["tokenizer"], _part(_work["folder"], shard)
    ids: dict[bool, list[np.ndarray]] = {False: [], True: []}
    sizes: dict[bool, list[int]] = {False: [], True: []}
    for document in sources.read(shard):
        side = sources.held_out(document.key, _work["holdout"])
        whole = [tokenizer.bos_id]
        for text in document.texts:
            whole += [*tokenizer.encode(text), tokenizer.eos_id]
        ids[side].append(np.array(whole, _dtype(tokenizer)))
        sizes[side].append(sum(len(text.encode("utf-8")) for text in document.texts))
    arrays: dict[str, np.ndarray] = {}
    for side, part in ((False, "train"), (True, "valid")):
        arrays[f"{part}_tokens"] = np.concatenate([np.zeros(0, _dtype(tokenizer)), *ids[side]])
        arrays[f"{part}_lengths"] = np.array([len(x) for x in ids[side]], np.int64)
        arrays[f"{part}_bytes"] = np.array(sizes[side], np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    _write(path, lambda file: _all_of(file, buffer.getbuffer()))
    return len(sizes[False]) + len(sizes[True]), sum(sizes[False] + sizes[True]), sum(map(len, ids[False] + ids[True]))


def _all_of(file: IO[bytes], data: memoryview) -> None:
    file.write(data)


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _part(folder: Path, shard: sources.Shard) -> Path:
    return folder / f"{shard.name}.npz"


def _tokenise(
    cuts: tuple[sources.Shard, ...], tokenizer: Tokenizer, folder: Path, holdout: float, workers: int, progress: bool
) -> None:
    """Bring every missing part into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in cuts if not _part(folder, shard).is_file()]
    with _bar(len(missing), progress) as advance, contextlib.ExitStack() as stack:
        if workers <= 1:
            _start_worker(tokenizer, folder, holdout)
            results: Iterator[tuple[int, int, int]] = map(_tokenise_shard, missing)
        else:
            # Spawned, not forked: JAX and the tokenizers run threads, and a fork would copy their locks.
            pool = concurrent.futures.ProcessPoolExecutor(
                min(workers, max(1, len(missing))),
                multiprocessing.get_context("spawn"),
                _start_worker,
                (tokenizer, folder, holdout),
            )
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            futures = [pool.submit(_tokenise_shard, shard) for shard in missing]
            results = (future.result() for future in concurrent.futures.as_completed(futures))
        for done in results:
            advance(*done)


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int, int, int], None]]:
    """A progress bar on standard error, where a person watches."""
    if not (progress and sys.stderr.isatty() and total):
        yield lambda documents, size, tokens: None
        return
    from rich import console
    from rich import progress as bars

    text = "{task.fields[documents]:,} documents  {task.fields[mb]:,.0f} MB  {task.fields[rate]:,.0f} tokens/s"
    columns = bars.TextColumn("tokenising"), bars.BarColumn(), bars.TextColumn(text), bars.TimeRemainingColumn()
    seen = [0, 0, 0]
    with bars.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, documents=0, mb=0.0, rate=0.0)

        def advance(*counts: int) -> None:
            seen[:] = [a + b for a, b in zip(seen, counts, strict=True)]
            rate = seen[2] / max(bar.tasks[0].elapsed or 0.0, 1e-9)
            bar.update(task, advance=1, documents=seen[0], mb=seen[1] / 1e6, rate=rate)

        yield advance


# ----------------------------------------------------------------------------------------------------- parts → a cache


def _merge(folder: Path, part: str, cuts: tuple[sources.Shard, ...], tokenizer: Tokenizer, source: str) -> None:
    """Join the parts of a source in shard order into `folder/part`, which appears all at once."""
    if (folder / part / "index.json").is_file():
        return
    building = folder / f"{part}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    lengths, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]

    def tokens(file: IO[bytes]) -> None:
        for shard in cuts:
            with np.load(_part(folder / "parts", shard), allow_pickle=False) as held:
                file.write(held[f"{part}_tokens"].data)
                lengths.append(held[f"{part}_lengths"])
                sizes.append(held[f"{part}_bytes"])

    _write(building / "tokens.bin", tokens)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    raw = np.concatenate(sizes)
    if not len(raw):
        shutil.rmtree(building)
        remedy = "give more text or change holdout" if part == "valid" else "name one with text, or lower holdout"
        raise ValueError(f"{source}: the corpus is empty: not one document fell to {part!r}; {remedy}")
    _write(building / "offsets.bin", lambda file: _all_of(file, offsets.data))
    _write(building / "raw_bytes.bin", lambda file: _all_of(file, raw.data))
    index = {
        "version": VERSION,
        "documents": len(raw),
        "tokens": int(offsets[-1]),
        "raw_bytes": int(raw.sum()),
        "skipped_files": sum(shard.skipped for shard in cuts),
        "dtype": np.dtype(_dtype(tokenizer)).name,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id or 0,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "files": {
            file.name: {"bytes": file.stat().st_size, "crc32": _crc(file)} for file in sorted(building.glob("*.bin"))
        },
    }
    _write(building / "index.json", lambda file: _all_of(file, memoryview(json.dumps(index, indent=2).encode())))
    building.rename(folder / part)
