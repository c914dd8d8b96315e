"""Machines joined by a slow network: which mesh axes cross it.

A slice is what a fast network joins: a TPU slice, or the GPUs of a node (of a rack, where NVLink spans it).
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

# Axes that may cross the slow network, outer to inner. Tensor parallelism waits for the network twice in every layer.
CROSSING = ("replica", "stage", "data", "fsdp", "context", "expert")


def slice_of(device: Any) -> int:
    """What the runtime says, else a GPU's process. A CPU's processes stand in for anything: in the order given."""
    for name in ("slice_index", "partition_index"):
        if (found := getattr(device, name, None)) is not None:
            return int(found)
    return int(device.process_index) if device.platform == "gpu" else 0


def across(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """How many of each axis' ways lie in different slices: outer axes first."""
    out, left = dict.fromkeys(sizes, 1), slices
    for axis in CROSSING:
        out[axis] = math.gcd(sizes[axis], left)
        left //= out[axis]
    if left > 1:
        shown = ", ".join(f"mesh.{a} {sizes[a]}" for a in sizes if sizes[a] > 1)
        raise ValueError(
            f"mesh: {slices} slices (machines that a slow network joins) do not divide over the axes that may cross it "
            f"({', '.join(CROSSING)}) of {shown}; make their product a multiple of {slices}, data or fsdp first"
        )
    return out


def arranged(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Devices as a mesh of `sizes`: each slice is a block of it. Where sizes are no product of a slice's dimensions,
    these are split among axes (8 × 8 on 4 × 4 × 4)."""
    groups = collections.defaultdict(list)
    for d in devices:
        groups[slice_of(d)].append(d)
    if len(groups) == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), list(devices), allow_split_physical_axes=True)
    counts = {k: len(v) for k, v in sorted(groups.items())}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{n} in slice {k}" for k, n in counts.items())
        raise ValueError(f"mesh: slices must be equal, and there are {shown} devices; leave some out, or start again")
    outer = across(sizes, len(groups))
    inner = tuple(n // outer[a] for a, n in sizes.items())
    blocks = np.empty(len(groups), object)
    for i, key in enumerate(sorted(groups)):
        blocks[i] = mesh_utils.create_device_mesh(inner, groups[key], allow_split_physical_axes=True)
    return np.block(blocks.reshape(tuple(outer.values())).tolist())


def told(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    """Which axes cross slices, in words; nothing where there is one, or where no device is named."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return ""
    n = len({slice_of(d) for d in mesh.devices.flat})
    crossing = " × ".join(f"{a} {k}" for a, k in across(mesh.shape, n).items() if k > 1)
    return f"{n}; {crossing} between them" if n > 1 else ""
