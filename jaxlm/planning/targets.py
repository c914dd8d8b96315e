"""Names machines, here or not: `v5p:4x4x4`, `v5p-128`, `2*v5e:16x16`, `h100:8x8` (nodes × GPUs), `cpu:8`, `here`.

A target that isn't here is described to its own compiler, which runs on any CPU: libtpu's for TPUs, XLA's for GPUs.
"""

import contextlib
import ctypes
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from jaxlm.core.errors import nearest
from jaxlm.runtime import chips
from jaxlm.runtime.chips import Chip

EXAMPLES = "v5p:4x4x4, v5p-128, v6e:16x16, 2*v5e:16x16, h100:8, h100:8x8, cpu:8, here"
# Slices that Google Cloud offers, in chips. Chips with two dimensions come in FLAT ones alone. Chips with three come in
# SMALL ones, and beyond 4x4x4 in multiples of 4 in ascending order, up to LARGEST chips.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
LARGEST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}


@dataclass(frozen=True)
class Target:
    """A Target is a machine, or many, that a program may be compiled for."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of a TPU slice; (nodes, GPUs a node); or (CPU devices,)."""
    slices: int = 1
    here: bool = False
    """Whether it is the machine that this runs on."""

    @property
    def count(self) -> int:
        """Returns the devices of all slices together."""
        return math.prod(self.shape) * self.chip.devices * self.slices

    @property
    def near(self) -> int:
        """Returns the number of devices that reach each other over the fast network: of a slice, or of a node."""
        return self.shape[-1] if self.chip.platform == "gpu" else self.count // self.slices

    @property
    def wraps(self) -> tuple[bool, bool, bool]:
        """Returns along which dimensions of a TPU slice the last chip reaches the first.

        All do in a slice that is made of cubes of 4x4x4, and in a flat one those of a whole pod's 16 (Google Cloud's
        pages on TPU architecture).
        """
        if self.chip.dims == 2:
            return self.shape[0] == 16, self.shape[1] == 16, False
        ring = self.chip.dims == 3 and all(n % 4 == 0 for n in self.shape)
        return ring, ring, ring

    def devices(self) -> list[Any]:
        """Returns the devices as JAX describes them; outer ones of a mesh come first, so that those of a slice or node
        stay together.

        Raises ValueError where the compiler for them is missing.
        """
        if self.here:
            return jax.devices()
        if self.chip.platform == "cpu":
            return _cpus(self.count)
        jax.config.update("jax_platforms", "cpu")  # nothing runs here; without it JAX would look for a TPU
        if self.chip.platform == "tpu":
            require("libtpu", "jax[tpu]", self)
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu isn't told where it is by Google's cloud here
            # the two cores of a v4 chip are one device
            options: dict[str, Any] = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
            options |= {"num_slices": self.slices} if self.slices > 1 else {}
            options |= {"wrap": self.wraps} if any(self.wraps) else {}
            name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
        require("jax_cuda13_plugin", "jax[cuda13]", self)
        nodes = f"1x{self.shape[0]}x{self.shape[1]}"
        with without_driver(self):
            topology = topologies.get_topology_desc(
                self.name, platform="cuda", target_config=chips.xla_target(self.chip), topology=nodes
            )
        return list(topology.devices)


@contextlib.contextmanager
def without_driver(target: Target) -> Iterator[None]:
    """Lets JAX start within its context although NVIDIA's driver isn't here, if the target is a GPU.

    JAX's CUDA plug-in compares the versions of NVIDIA's libraries when it is first loaded, and where there is no driver
    to ask it is then not available at all. Nothing of a plan runs on a GPU, so the comparison is skipped:
    `JAX_SKIP_CUDA_CONSTRAINTS_CHECK` is set for as long as the context lasts, unless the caller has set it.
    """
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    if target.here or target.chip.platform != "gpu" or name in os.environ or has_nvidia_driver():
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def has_nvidia_driver() -> bool:
    """Returns whether the library that NVIDIA's driver brings can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def require(module: str, package: str, target: Target) -> None:
    """Refuses a target whose compiler is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f'target: the compiler for {target.name} is missing: pip install "{package}"')


def parse(name: str) -> Target:
    """Returns the machine that a name means. Raises ValueError for an unknown one, which names the nearest that
    exist."""
    if name == "here":
        return here()
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+?)(?:([:-])(\d+(?:x\d+)*))?", name.lower())
    if not match:
        raise ValueError(f"target: {name!r} is no machine; examples: {EXAMPLES}")
    slices, short, mark, size = int(match[1] or 1), chips.ALIASES.get(match[2], match[2]), match[3], match[4]
    if not slices or "0" in (size or "").split("x"):
        raise ValueError(f"target: {name!r} has no devices; examples: {EXAMPLES}")
    if short == "cpu":
        return Target(name, CPU, (int(size or 1) if (size or "1").isdigit() else _refuse(name, ("cpu:8",)),))
    if short not in chips.CHIPS:
        raise ValueError(f"target: no chip {match[2]!r}{nearest(short, [*chips.CHIPS, 'cpu', 'here'])}")
    chip = chips.CHIPS[short]
    if chip.platform == "gpu":
        numbers = tuple(int(n) for n in (size or "1").split("x"))
        numbers = (1, *numbers) if len(numbers) == 1 else numbers
        if len(numbers) != 2 or numbers[1] > chip.host or slices > 1 or mark == "-":
            nodes = max(1, math.prod(numbers) * slices // chip.host)
            _refuse(name, (f"{short}:{nodes}x{chip.host}", f"{short}:{chip.host}"))
        return Target(name, chip, numbers)
    known = shapes(chip)
    if mark == "-":
        chip_count, rest = divmod(int(size) if size.isdigit() else 0, chip.cores)
        by_count = {math.prod(s): s for s in known}
        if rest or chip_count not in by_count:
            close = sorted(by_count, key=lambda n: abs(math.log(max(n, 1) / max(chip_count, 1))))[:3]
            _refuse(name, [f"{short}-{n * chip.cores}" for n in sorted(close)])
        return Target(name, chip, by_count[chip_count], slices)
    shape = tuple(int(n) for n in (size or "").split("x") if n)
    if shape not in known:
        _refuse(name, [f"{short}:{'x'.join(map(str, s))}" for s in _close(shape, known)])
    return Target(name, chip, shape, slices)


def shapes(chip: Chip) -> list[tuple[int, ...]]:
    """Returns the slices of a TPU that exist; of those of one size the most compact comes last."""
    if chip.dims == 2:
        return [tuple(int(n) for n in s.split("x")) for s in FLAT]
    top = LARGEST[chip.name]
    cubes = [(a, b, c) for a in range(4, 25, 4) for b in range(a, 49, 4) for c in range(b, top // (a * b) + 1, 4)]
    cubes.sort(key=lambda s: (math.prod(s), -sum(s)))
    return [tuple(int(n) for n in s.split("x")) for s in SMALL[:-1]] + cubes


def _close(shape: tuple[int, ...], known: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    size = math.prod(shape) or 1
    return sorted(known, key=lambda s: (abs(math.log(math.prod(s) / size)), sum(s)))[:3]


def _refuse(name: str, instead: Any) -> Any:
    raise ValueError(f"target: {name!r} doesn't exist; nearest: {', '.join(instead)}")


CPU = Chip("cpu", "cpu", "cpu", 0.0, 0.0, 1, 0.0, 0.0)


def here() -> Target:
    """Returns the machine that this runs on."""
    devices = jax.devices()
    first, hosts = devices[0], jax.process_count()
    chip = chips.of_kind(first.device_kind) or (
        CPU if first.platform == "cpu" else Chip(first.device_kind, first.device_kind, first.platform, 0, 0, 1, 0, 0)
    )
    if chip.dims:
        coords = [d.coords for d in devices]
        shape: tuple[int, ...] = tuple(len({c[i] for c in coords}) for i in range(chip.dims))
        slices = len({getattr(d, "slice_index", 0) for d in devices})  # JAX gives it to TPUs in slices alone
        return Target("here", chip, shape, slices, here=True)
    shape = (hosts, len(devices) // hosts) if chip.platform == "gpu" else (len(devices),)
    return Target("here", chip, shape, here=True)


def _cpus(n: int) -> list[Any]:
    """Returns so many devices of this CPU, which must be asked for before JAX has started."""
    jax.config.update("jax_platforms", "cpu")
    with_flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not with_flag:
        with contextlib.suppress(RuntimeError):  # JAX has started
            jax.config.update("jax_num_cpu_devices", n)
    if len(jax.devices()) < n:
        raise ValueError(f"target: cpu:{n} is more than the {len(jax.devices())} devices JAX has started with here")
    return jax.devices()[:n]
