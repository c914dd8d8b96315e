"""A manifest holds checksums of a checkpoint's files, so that a damaged one is noticed before it is read."""

import concurrent.futures
import json
import os
import zlib
from pathlib import Path

from jaxlm.core.errors import one_line

MANIFEST = "manifest.json"
# Orbax touches these after the manifest is written; nothing is ever read from them here.
UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")
CHUNK = 8 << 20  # bytes read at a time


def write_manifest(folder: Path) -> None:
    """Writes the size and CRC-32 of every file under `folder`, and a CRC-32 of that list itself."""
    names = sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, *UNREAD)
    )
    files = {name: list(_size_and_crc(folder / name)) for name in names}
    text = json.dumps({"crc32": zlib.crc32(json.dumps(files).encode()), "files": files}, indent=1)
    with open(folder / MANIFEST, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def damage(folder: Path, items: tuple[str, ...] | None) -> str | None:
    """Compares files with the manifest and says what is wrong with them; None if nothing is.

    Only files of `items` are read, every byte of them; None means all. A folder without a manifest counts as sound.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text())
        files = content["files"]
        if content["crc32"] != zlib.crc32(json.dumps(files).encode()):
            return f"{MANIFEST} has been altered"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read ({one_line(error, 200)})"
    wanted = {name: v for name, v in files.items() if items is None or name.split("/")[0] in items}
    for name, (size, _) in wanted.items():  # sizes cost nothing, so they come first
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # crc32 lets go of the interpreter's lock
        sums = {name: pool.submit(_size_and_crc, folder / name) for name in wanted}
        for name, (_, crc) in wanted.items():
            try:
                if sums[name].result()[1] != crc:
                    return f"{name} has a wrong checksum"
            except OSError as error:
                return f"{name} can't be read ({one_line(error, 200)})"
    return None


def _size_and_crc(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
