"""Reads and writes llama.cpp's importance matrices ("imatrix" files): the mean squares of each matrix's inputs over a
calibration text, by GGUF's names of tensors.

A file holds sums of squares over tokens (`NAME.in_sum2`, `[experts or 1, columns]`) and how many tokens there were
(`NAME.counts`, `[experts or 1, 1]`).
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlm.formats import gguf

SUMS, COUNTS = ".in_sum2", ".counts"
KIND = "imatrix"  # the file's general.type


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the mean square of each column, `[columns]`, or `[experts, columns]`, by the names of tensors.

    Raises a ValueError that names the file where it isn't such a file, or damaged. An expert that no token reached has
    the mean of the others.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = gguf.reader_type()(path)
        kind = reader.fields.get("general.type")
        if kind is None or kind.contents() != KIND:
            raise ValueError(
                "not an importance matrix (general.type imatrix); make one by llama-imatrix or name a text"
            )
        found = {t.name: np.asarray(t.data, np.float64) for t in reader.tensors}
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ValueError(f"{path}: {error if isinstance(error, ValueError) else f'damaged: {error!r}'}") from error
    out = {}
    for name in (n.removesuffix(SUMS) for n in found if n.endswith(SUMS)):
        sums, counts = np.atleast_2d(found[name + SUMS]), found.get(name + COUNTS)
        if counts is None or counts.size not in (1, len(sums)) or not counts.any():
            raise ValueError(f"{path}: {name} has no counts of tokens that fit its sums; make the file again")
        counts = np.broadcast_to(counts.reshape(-1, 1), (len(sums), 1))
        means = np.where(counts > 0, sums / np.maximum(counts, 1), sums.sum(0) / counts.sum())
        if not (np.isfinite(means).all() and (means >= 0).all()):
            raise ValueError(f"{path}: {name} holds negative, infinite or NaN sums of squares; make the file again")
        out[name] = (means if len(means) > 1 else means[0]).astype(np.float32)
    if not out:
        raise ValueError(f"{path}: holds no sums of squares; make the file again")
    return out


def write(path: str | Path, importance: Mapping[str, np.ndarray], tokens: int, length: int, source: str) -> None:
    """Writes mean squares of inputs as llama.cpp reads them, measured on `tokens` tokens of rows of `length`."""
    path, library = Path(path), gguf.library()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = library.GGUFWriter(partial, KIND)
    # The library calls the kind of file an architecture, which files of this kind don't have.
    writer.kv_data[0].pop("general.architecture")
    writer.add_string("general.type", KIND)
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", -(-tokens // length))
    writer.add_uint32("imatrix.chunk_size", length)
    for name, means in sorted(importance.items()):
        rows = np.atleast_2d(means).astype(np.float32)
        writer.add_tensor(name + SUMS, rows * np.float32(tokens))
        writer.add_tensor(name + COUNTS, np.full((len(rows), 1), tokens, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        for file in writer.fout or ():
            file.close()
        partial.unlink(missing_ok=True)
