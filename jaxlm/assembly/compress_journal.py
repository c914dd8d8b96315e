"""Keeps on disk what a compression works with, so that it can be killed at any time and goes on to the same files: the
request, the weights as they were, and each layer once it is small."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly.model_source import Source
from jaxlm.assembly.open_model import read, read_each
from jaxlm.core import spec, tree

REQUEST, WHOLE, SOURCE, LAYERS = "request.json", "whole", "source", "layers"


class Journal:
    """A Journal is the folder in which a compression works."""

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        """Raises ValueError where another request is under way there."""
        self.folder = folder
        self.is_new = not (folder / REQUEST).is_file()
        if self.is_new:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / LAYERS).mkdir(parents=True)
            _replace(folder / REQUEST, json.dumps(request, indent=1).encode())
            return
        before = json.loads((folder / REQUEST).read_text("utf-8"))
        for key in request:
            if before.get(key) != json.loads(json.dumps(request[key])):
                raise ValueError(
                    f"{folder}: holds a compression under way with another {key} ({before.get(key)!r}, here "
                    f"{request[key]!r}); finish that, delete the folder, or choose another target"
                )

    # ---- the weights as they were

    def keep_source(self, source: Source, specs: Any, step: int | None) -> None:
        """Writes each weight of the model to a file of its own, from which layers are read; what is there already is
        not read again. One weight, of all its layers, is held at a time."""
        folder, done = self.folder / SOURCE, self.folder / SOURCE / WHOLE
        if done.is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

        def keep(path: str, w: jax.Array) -> np.ndarray:
            np.save(folder / _file(path), np.asarray(w))
            return np.zeros(0, np.float32)

        if source.run is not None:
            for path, w in read_each(source, specs, step):
                keep(path, w)
        else:
            homes = jax.tree.map(
                lambda s: jax.sharding.SingleDeviceSharding(jax.devices()[0]), specs, is_leaf=spec.is_spec
            )
            read(source, specs, homes, transform=keep)
        done.touch()

    def weight(self, path: str) -> np.ndarray:
        """Returns a weight as it was, by memory map: pages are read where they are looked at."""
        made: np.ndarray = np.load(self.folder / SOURCE / _file(path), mmap_mode="r")
        return made

    # ---- layers that are done

    def has(self, stack: str, layer: int) -> bool:
        """Says whether a layer is done."""
        return self._layer(stack, layer).is_file()

    def write(self, stack: str, layer: int, weights: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Writes a layer that is done: arrays by their paths in it, and what is known of each weight."""
        at = self._layer(stack, layer)
        part = at.with_suffix(".tmp")
        with part.open("wb") as file:
            arrays = {path: np.ascontiguousarray(w) for path, w in tree.flatten(dict(weights)).items()}
            np.savez(file, **{path: _plain(w) for path, w in arrays.items()})  # type: ignore[arg-type]
        _replace(at.with_suffix(".json"), json.dumps(figures).encode())
        os.replace(part, at)

    def layer(self, stack: str, layer: int, dtypes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns the arrays of a layer by their paths in it, whose dtypes are `dtypes`."""
        with np.load(self._layer(stack, layer)) as found:
            return {path: found[path].view(dtypes[path]) for path in found.files}

    def figures(self, stack: str, layer: int) -> dict[str, Any]:
        """Returns what is known of each weight of a layer."""
        made: dict[str, Any] = json.loads(self._layer(stack, layer).with_suffix(".json").read_text("utf-8"))
        return made

    def tidy(self) -> None:
        """Removes all but what the finished directory holds."""
        for name in (SOURCE, LAYERS):
            shutil.rmtree(self.folder / name)
        (self.folder / REQUEST).unlink()

    def _layer(self, stack: str, layer: int) -> Path:
        return self.folder / LAYERS / f"{_name(stack)}.{layer}.npz"


def _name(path: str) -> str:
    return path.replace("/", ".")


def _file(path: str) -> str:
    return f"{_name(path)}.npy"


def _plain(w: np.ndarray) -> np.ndarray:
    """Returns an array as NumPy's files have it: of dtypes that NumPy doesn't know the bytes."""
    if w.dtype.kind != "V":
        return w
    return w.view(np.uint8 if w.dtype.itemsize == 1 else np.uint16)


def _replace(file: Path, content: bytes) -> None:
    part = file.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, file)


def stamp(source: Source) -> list[list[Any]]:
    """Returns name, size and time of the files that a model lies in, by which another one at its place is told."""
    folder = source.path
    files = [folder]
    if not folder.is_file():
        kinds = ("*.safetensors", "checkpoints/*/manifest.json", "config.json")
        files = [path for kind in kinds for path in folder.glob(kind)]
    return [[f.relative_to(folder.parent).as_posix(), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]


def on_devices(arrays: Mapping[str, np.ndarray], homes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a layer's arrays as a tree on the devices; `homes` are their shardings."""
    made: dict[str, Any] = {}
    for path, w in arrays.items():
        made = tree.put(made, path, jax.device_put(jnp.asarray(w), homes[path]))
    return made
