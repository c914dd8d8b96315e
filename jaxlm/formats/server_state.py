"""A parameter server's checkpoints: what it holds at a version, in one atomic folder with checksums.

`version-<n>/` holds `part-<i>/` with the arrays of each process of the server, `book.json`, and `manifest.json` with
size and CRC-32 of every file. It appears under its name by one rename; a killed server leaves only a `*.new` folder
behind.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.formats.manifest import damage, write_manifest

NAME = re.compile(r"version-(\d+)")


def versions(folder: Path) -> list[int]:
    """Returns the versions that are there, ascending, damaged ones included."""
    names = [NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[1]) for m in names if m)


def new(folder: Path, version: int) -> Path:
    """Returns the empty folder in which a version is written before it has its name."""
    at = folder / f"version-{version}.new"
    shutil.rmtree(at, ignore_errors=True)  # of a server that was killed
    at.mkdir(parents=True)
    return at


def write_part(folder: Path, number: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays of one process of the server into the folder that `new` made."""
    at = folder / f"part-{number}"
    at.mkdir()
    for name, x in arrays.items():
        with open(at / f"{name}.npy", "wb") as file:
            np.save(file, x)
            file.flush()
            os.fsync(file.fileno())


def commit(folder: Path, version: int, book: Mapping[str, Any], keep: int) -> None:
    """Gives a version, whose parts are all written, its name; removes all but the newest `keep`."""
    at = folder / f"version-{version}.new"
    (at / "book.json").write_text(json.dumps(book))
    write_manifest(at)
    shutil.rmtree(folder / f"version-{version}", ignore_errors=True)  # of a history that was taken back
    at.rename(folder / f"version-{version}")
    for old in versions(folder)[:-keep]:
        shutil.rmtree(folder / f"version-{old}")


def newest(folder: Path) -> int | None:
    """Returns the newest version whose files are what was written; None: there is none. Those that are damaged are
    named and removed, for the run goes on before them. ValueError: all are damaged."""
    found = versions(folder)
    for version in reversed(found):
        fault = damage(folder / f"version-{version}", None)
        if fault is None:
            return version
        print(f"WARNING: {folder}/version-{version} is damaged: {fault}; an earlier one is used", file=sys.stderr)
        (folder / f"version-{version}").rename(folder / f"damaged-version-{version}")
    if found:
        raise ValueError(f"{folder}: no checkpoint of the server is sound; restore one, or start under another `name`")
    return None


def read_book(folder: Path, version: int) -> dict[str, Any]:
    """Returns what `commit` was given as the book of a version."""
    return json.loads((folder / f"version-{version}" / "book.json").read_text())


def read_part(folder: Path, version: int, number: int) -> dict[str, np.ndarray]:
    """Returns the arrays of one process of the server. ValueError: the version was saved by fewer."""
    at = folder / f"version-{version}" / f"part-{number}"
    if not at.is_dir():
        raise ValueError(
            f"distributed.server.shards: {folder}/version-{version} was saved by fewer processes; keep their number"
        )
    return {path.stem: np.load(path) for path in sorted(at.glob("*.npy"))}
