"""Devices are ordered so that outer mesh axes cross the slow network between slices, and inner ones stay within one.

A slice is a set of devices that a fast network joins: a TPU slice, or the GPUs of a node (of a rack, if NVLink spans
it).
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
    """Returns the number of a device's slice: what the runtime says, else a GPU's process, else 0.

    CPUs, which stand in for any other device in tests, are all in one slice.
    """
    for name in ("slice_index", "partition_index"):
        number = getattr(device, name, None)  # each backend's devices have one of the two, or neither
        if number is not None:
            return int(number)
    return int(device.process_index) if device.platform == "gpu" else 0


def ways_across_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Returns how many ways of each axis lie in different slices; outer axes cross first.

    Raises ValueError if the slices don't divide over the axes in `CROSSING`.
    """
    out, remaining = dict.fromkeys(sizes, 1), slices
    for axis in CROSSING:
        out[axis] = math.gcd(sizes[axis], remaining)
        remaining //= out[axis]
    if remaining > 1:
        shown = ", ".join(f"mesh.{a} {sizes[a]}" for a in sizes if sizes[a] > 1)
        raise ValueError(
            f"mesh: {slices} slices (machines that a slow network joins) do not divide over the axes that may cross it "
            f"({', '.join(CROSSING)}) of {shown}; make their product a multiple of {slices}, data or fsdp first"
        )
    return out


def arrange(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Returns devices as an array of `sizes`, of which each slice is a block.

    If sizes are no product of a TPU slice's dimensions, these are split among axes (8 × 8 on 4 × 4 × 4). Raises
    ValueError if slices differ in size.
    """
    groups = collections.defaultdict(list)
    for d in devices:
        groups[slice_of(d)].append(d)
    if len(groups) == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), list(devices), allow_split_physical_axes=True)
    counts = {k: len(v) for k, v in sorted(groups.items())}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{n} in slice {k}" for k, n in counts.items())
        raise ValueError(f"mesh: slices must be equal, and there are {shown} devices; leave some out, or start again")
    outer = ways_across_slices(sizes, len(groups))
    inner = tuple(n // outer[a] for a, n in sizes.items())
    blocks = np.empty(len(groups), object)
    for i, key in enumerate(sorted(groups)):
        blocks[i] = mesh_utils.create_device_mesh(inner, groups[key], allow_split_physical_axes=True)
    return np.block(blocks.reshape(tuple(outer.values())).tolist())


def describe_crossing(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> str:
    """Returns which axes cross how many slices, in words; empty for one slice and for an abstract mesh."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return ""
    n = len({slice_of(d) for d in mesh.devices.flat})
    crossing = " × ".join(f"{a} {k}" for a, k in ways_across_slices(mesh.shape, n).items() if k > 1)
    return f"{n}; {crossing} between them" if n > 1 else ""
