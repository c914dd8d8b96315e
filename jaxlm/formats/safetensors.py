"""Safetensors files are read tensor by tensor and slice by slice, and written tensor by tensor into shards.

A file is eight bytes with the length of a JSON header `{name: {dtype, shape, data_offsets}}`, the header, the numbers.
The `safetensors` library checks the header (its size, offsets, overlaps, holes, truncation). The numbers are read by
position rather than through a memory map, whose touched pages would count as the process's memory.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 4 << 20  # bytes read at a time where only a part of each row is wanted
JSON_LIMIT = 100_000_000  # bytes of a JSON file; the safetensors library limits headers so too
PICKLED = ("pytorch_model*.bin*", "*.pt", "*.pth", "*.pkl", "*.ckpt", "consolidated*.pth")


class Entry(NamedTuple):
    """An entry says which file holds a tensor, and at which byte it starts."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Files:
    """This object knows all tensors of a directory by its files' headers; the numbers are read when asked for.

    `entries` are in the order of the bytes, file after file.
    """

    directory: Path
    entries: Mapping[str, Entry]

    def read(self, name: str, index: Sequence[slice] | None = None, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Reads a tensor, or its part at `index` (slices with start and stop) after a reshape to `shape` if given.

        It needs memory for the result and, where rows are wanted in part, one block of them.
        """
        file, dtype, stored_shape, start = self.entries[name]
        shape = stored_shape if shape is None else shape
        index = [slice(0, size) for size in shape] if index is None else list(index)
        assert math.prod(shape) == math.prod(stored_shape), f"{name}: {stored_shape} is not {shape}"
        assert len(index) == len(shape), f"{name}: {index} is not of {shape}"
        out = np.empty([s.stop - s.start for s in index], dtype)
        with file.open("rb", buffering=0) as source:
            _fill(source, start, shape, index, out)
        return out


def _fill(source: BinaryIO, start: int, shape: tuple[int, ...], index: Sequence[slice], out: np.ndarray) -> None:
    """Fills `out` with the part at `index` of the array of `shape` that begins at byte `start`."""
    if not out.size:
        return
    row = math.prod(shape[1:]) * out.itemsize
    first = index[0].start if shape else 0
    if all((s.start, s.stop) == (0, size) for s, size in zip(index[1:], shape[1:], strict=True)):
        _read(source, start + first * row, out)
    elif row > BLOCK:
        for i in range(len(out)):
            _fill(source, start + (first + i) * row, shape[1:], index[1:], out[i])
    else:
        rows = BLOCK // row
        block = np.empty((min(rows, len(out)), *shape[1:]), out.dtype)
        for i in range(0, len(out), rows):
            part = block[: len(out) - i]
            _read(source, start + (first + i) * row, part)
            out[i : i + rows] = part[(slice(None), *index[1:])]


def _read(source: BinaryIO, start: int, out: np.ndarray) -> None:
    buffer = out.reshape(-1).view(np.uint8).data
    source.seek(start)
    done = 0
    while done < len(buffer):
        n = source.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not n:
            raise ValueError(f"{source.name}: ended while it was being read; is another process writing it?")
        done += n


# ------------------------------------------------------------------------------------------------------------- opening


def open_files(directory: str | Path, stem: str = "model") -> Files:
    """Opens `stem`.safetensors, or the shards that `stem`.safetensors.index.json lists; reads their headers alone.

    Raises a ValueError that names the file where one is missing, damaged or unsafe.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is a file, not a directory' if folder.exists() else 'does not exist'}")
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return Files(folder, _entries(single))
    if not index.is_file():
        raise ValueError(_why_unopened(folder, stem))
    weight_map = _weight_map(index)
    shards = {shard: _entries(_shard_path(index, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ValueError(f"{folder / shard}: lacks {name}, which {index.name} says it holds; fetch both again")
    listed = {n: e for shard, entries in shards.items() for n, e in entries.items() if weight_map.get(n) == shard}
    return Files(folder, listed)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises a ValueError that names the file for anything else."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"more than {JSON_LIMIT:,} bytes")
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: can't be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is not a JSON object {{…}}")
    return values


def _entries(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, "np"):  # checks the whole header
            pass
    except (SafetensorError, OSError) as error:
        why = str(error).replace("Error while deserializing header: ", "")
        raise ValueError(f"{path}: not a whole safetensors file ({why}); fetch or export it again") from None
    with path.open("rb") as source:
        (size,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(size), object_pairs_hook=lambda pairs: _unique(path, pairs))
    header.pop("__metadata__", None)
    out = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of dtype {entry['dtype']}, which is not read; bring it as BF16 or F32")
        out[name] = Entry(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
    return out


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        repeated = next(name for name in out if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{path}: its header names {repeated} twice; fetch or export it again")
    return out


def _weight_map(index: Path) -> dict[str, str]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(shard, str) for shard in weights.values()):
        raise ValueError(f"{index}: has no weight_map of tensor names to files; fetch it again")
    return weights


def _shard_path(index: Path, shard: str) -> Path:
    """Returns the shard's path. An index is untrusted: it may name files beside it and no others."""
    path = index.parent / shard
    if shard != os.path.basename(shard) or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
        raise ValueError(f"{index}: names {shard!r}, which is not a .safetensors file beside it; refused")
    if not path.is_file():
        raise ValueError(f"{path}: missing, although {index.name} lists it; fetch it too")
    folder = index.parent.resolve()
    folders = [folder]
    if folder.parent.name == "snapshots":  # the Hub's cache: snapshots/REVISION/model.safetensors -> ../../blobs/…
        folders.append(folder.parent.parent / "blobs")
    if path.resolve().parent not in folders:
        raise ValueError(f"{path}: is a link out of its directory; refused. Copy the file there instead")
    return path


def _why_unopened(folder: Path, stem: str) -> str:
    """Says why a directory can't be opened, and what to do."""
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    shards = sorted(path.name for path in folder.glob(f"{stem}-*.safetensors"))
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"{folder}: holds {shards[0]} but no {stem}.safetensors.index.json; fetch or export it again, whole"
    if pickled:
        return (
            f"{folder}: holds only {pickled[0]}, a pickle, which could run any code and is never opened; convert it "
            "elsewhere with transformers: model.save_pretrained(DIRECTORY, safe_serialization=True)"
        )
    return f"{folder}: holds no {stem}.safetensors" + (f", only {', '.join(other)}" if other else "")


# ------------------------------------------------------------------------------------------------------------- writing


def write(
    directory: str | Path,
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    *,
    stem: str = "model",
    max_bytes: int = 5_000_000_000,
) -> list[Path]:
    """Writes tensors of these dtypes and shapes, each asked for by name when its turn comes; returns the files.

    Files get their names when all are complete, the index last: after a kill nothing looks like a model.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(path.name for path in folder.glob(f"{stem}*.safetensors*"))
    if existing:
        raise ValueError(f"{folder}: holds {existing[0]} already; choose another directory or remove it")
    sizes = {name: np.dtype(dtype).itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()}
    shards = _shards(sizes, max_bytes)
    count = len(shards)
    files = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    partial = {folder / name: folder / f".{name}.{os.getpid()}.partial" for name in files}
    index = folder / f"{stem}.safetensors.index.json"
    try:
        for path, names in zip(partial.values(), shards, strict=True):
            _write_file(path, {name: tensors[name] for name in names}, read)
        if count > 1:
            partial[index] = folder / f".{index.name}.{os.getpid()}.partial"
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            meta = {"total_size": sum(sizes.values())}
            partial[index].write_text(json.dumps({"metadata": meta, "weight_map": weight_map}, indent=2) + "\n")
        for path, written in partial.items():
            written.replace(path)
    finally:
        for written in partial.values():
            written.unlink(missing_ok=True)
    return list(partial)


def _shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Distributes names in order, as many a file as fit; a tensor above the limit has a file of its own."""
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _header(tensors: Mapping[str, tuple[Any, tuple[int, ...]]]) -> tuple[bytes, list[str], int]:
    """Returns what a file begins with, the order of its tensors, and how many bytes their numbers take."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    # Wide numbers first, as the library does: every tensor then begins at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name][0]).itemsize, name))
    for name in order:
        dtype, shape = np.dtype(tensors[name][0]), tensors[name][1]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order, end


def _write_file(
    path: Path, tensors: Mapping[str, tuple[Any, tuple[int, ...]]], read: Callable[[str], np.ndarray]
) -> None:
    header, order, _ = _header(tensors)
    with path.open("wb") as out:
        out.write(header)
        for name in order:
            dtype, shape = tensors[name]
            out.write(_bytes(name, read(name), np.dtype(dtype), shape))
        out.flush()
        os.fsync(out.fileno())


def allocate(path: Path, tensors: Mapping[str, tuple[Any, tuple[int, ...]]]) -> Files:
    """Makes a file of tensors of these dtypes and shapes, all of them zero yet; `place` gives the room of each."""
    header, _, size = _header(tensors)
    with path.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + size)
    return Files(path.parent, _entries(path))


def place(files: Files, name: str) -> np.memmap:
    """Returns a tensor of an `allocate`d file as memory; what is written to it is in the file once it is let go."""
    file, dtype, shape, start = files.entries[name]
    return np.memmap(file, dtype, "r+", start, shape)


def _bytes(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> memoryview:
    """Returns a tensor's bytes. The array lives no longer than they do: the next must not be made while it exists."""
    assert (array.dtype, array.shape) == (dtype, shape), f"{name}: {array.dtype} {array.shape} is not {dtype} {shape}"
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
