"""Keeps a teacher's predictions of training rows on disk, so that they are computed once: the likeliest classes of each
place with their log probabilities, and that of all others together.

A row is known by what it holds, so it doesn't matter in which order, epoch or run it comes. Rows are appended, their
keys last: what was cut off in the middle of a row is dropped when the store is opened again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

KEY = 16  # bytes
ABOUT = "about.json"
LEAVES: dict[str, Any] = {"teacher_values": np.float32, "teacher_classes": np.int32, "teacher_rest": np.float32}
"""Leaves of a batch, and the type of their numbers."""


def key(row: Mapping[str, np.ndarray]) -> bytes:
    """Returns what tells a row from others: a hash of all its arrays."""
    digest = hashlib.blake2b(digest_size=KEY)
    for name in sorted(row):
        leaf = np.ascontiguousarray(row[name])
        digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
    return digest.digest()


@dataclass(frozen=True)
class Store:
    """A Store is a folder of predictions of rows, all of one shape."""

    folder: Path
    places: int
    """Places of a row that are predicted."""
    kept: int
    """Classes that are kept of each."""

    @classmethod
    def opened(cls, folder: Path, about: Mapping[str, Any]) -> "Store":
        """Opens a store, or makes a new one; `about` says whose predictions it holds, its `places` and `kept` classes.

        ValueError: it holds others.
        """
        file = folder / ABOUT
        if not file.is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"distill.cache: {folder} holds other files; name a folder of its own")
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
            part.rename(file)
        try:
            known = json.loads(file.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not JSON ({error}); delete the folder to make it anew") from None
        for name, value in about.items():
            if known.get(name) != value:
                raise ValueError(
                    f"distill.cache: {folder} holds logits of another {name} ({known.get(name)}, and the run's is "
                    f"{value}); name another folder, or delete it"
                )
        return cls(folder, about["places"], about["kept"])

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        wide, flat = (self.places, self.kept), (self.places,)
        return dict(zip(LEAVES, (wide, wide, flat), strict=True))

    def _files(self) -> dict[Path, int]:
        """Returns the bytes of a row in each file."""
        sizes = {name: 4 * int(np.prod(shape)) for name, shape in self._shapes.items()} | {"keys": KEY}
        return {self.folder / f"{name}.bin": size for name, size in sizes.items()}

    def repaired(self) -> "Store":
        """Cuts off what isn't whole, of a row that was being written; returns the store as it then is."""
        files = self._files()
        rows = min(file.stat().st_size // size if file.exists() else 0 for file, size in files.items())
        for file, size in files.items():
            with file.open("ab") as stream:
                stream.truncate(rows * size)
        return Store(self.folder, self.places, self.kept)

    @cached_property
    def index(self) -> dict[bytes, int]:
        """Returns the number of each row by its key."""
        file = self.folder / "keys.bin"
        data = file.read_bytes() if file.exists() else b""
        return {data[i : i + KEY]: i // KEY for i in range(0, len(data) - KEY + 1, KEY)}

    def append(self, keys: Sequence[bytes], leaves: Sequence[np.ndarray]) -> None:
        """Adds rows: their keys, and arrays `[rows, …]` in the order of `LEAVES`."""
        for name, leaf in zip(LEAVES, leaves, strict=True):
            with (self.folder / f"{name}.bin").open("ab") as stream:
                stream.write(np.ascontiguousarray(leaf, LEAVES[name]).tobytes())
        with (self.folder / "keys.bin").open("ab") as stream:
            stream.write(b"".join(keys))

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: np.memmap(self.folder / f"{name}.bin", LEAVES[name], "r").reshape(-1, *shape)
                for name, shape in self._shapes.items()}  # fmt: skip

    def leaves(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns what the teacher predicted of a row. ValueError: it isn't here."""
        if (at := self.index.get(key(row))) is None:
            raise ValueError(f"distill.cache: {self.folder} lacks a row of the data, which has changed; train anew")
        return {name: np.array(leaf[at]) for name, leaf in self._arrays.items()}


@dataclass(frozen=True)
class WithTeacher:
    """Makes examples that hold what the teacher predicted of them."""

    example: Callable[[Any, np.random.Generator], Mapping[str, Any]]
    store: Store

    def __call__(self, record: Any, rng: np.random.Generator) -> Mapping[str, Any]:
        row = self.example(record, rng)
        return {**row, **self.store.leaves(row)}

    def __reduce__(self) -> tuple[Any, ...]:  # without what was read of the store
        return WithTeacher, (self.example, Store(self.store.folder, self.store.places, self.store.kept))
