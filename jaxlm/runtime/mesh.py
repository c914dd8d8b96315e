"""Makes the device mesh, and says which devices programs are made for."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.core import config
from jaxlm.runtime import device_order

AXES = ("replica", "stage", "data", "fsdp", "context", "expert", "tensor")  # outer to inner
BATCH_AXES = ("replica", "data", "fsdp", "expert")


_target: contextvars.ContextVar[tuple[Any, ...] | None] = contextvars.ContextVar("target", default=None)


@dataclass(frozen=True)
class Described:
    """A device that is only described: enough is known to lay a program out for it, not to compile it."""

    platform: str
    device_kind: str


@contextlib.contextmanager
def on_devices(devices: Sequence[Any]) -> Iterator[None]:
    """Makes `devices` return these within its context; they may be descriptions of devices that aren't here."""
    token = _target.set(tuple(devices))
    try:
        yield
    finally:
        _target.reset(token)


def devices() -> list[Any]:
    """Returns the devices that programs are made for: this run's own, unless `on_devices` says otherwise."""
    target = _target.get()
    return jax.devices() if target is None else list(target)


def local_device() -> Any:
    """Returns one of `devices` that this process may compile for."""
    return jax.local_devices()[0] if _target.get() is None else devices()[0]


def platform() -> str:
    """Returns the platform of `devices`: cpu, gpu or tpu."""
    return jax.default_backend() if _target.get() is None else devices()[0].platform


def single_device_sharding() -> Any:
    """Returns the sharding of programs without a mesh: all on the first device."""
    one = devices()[0]
    return jax.sharding.SingleDeviceSharding(jax.devices()[0] if isinstance(one, Described) else one)


def sizes(c: config.Mesh, count: int) -> dict[str, int]:
    """Returns the size of every mesh axis for `count` devices; an axis of -1, or `data` by default, takes what is left.

    Raises ValueError, which names the axis, if sizes are wrong or don't fit.
    """
    out = {a: getattr(c, a) for a in AXES}
    if out["data"] is None:
        out["data"] = 1 if -1 in out.values() else -1
    free = [a for a, n in out.items() if n == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: only one axis may be -1, not {' and '.join(free)}")
    for a, n in out.items():
        if n < 1 and n != -1:
            raise ValueError(f"mesh.{a}: {n} is not a size; use a positive number, or -1 for what is left")
    fixed = math.prod(n for n in out.values() if n != -1)
    if free and count % fixed == 0:
        out[free[0]] = count // fixed
    elif fixed != count:
        shown = " × ".join(f"{a} {n}" for a, n in out.items() if n not in (1, -1)) or "1"
        more = "" if free else ", or leave mesh.data out: it takes what is left"
        raise ValueError(f"mesh: {shown} does not fit {count} devices; change a size{more}")
    return out


def make_mesh(c: config.Mesh, on: list[Any] | None = None) -> Any:
    """Returns the mesh of all devices, or None for a single one: then nothing is annotated at all.

    It is abstract for `Described` devices. Raises ValueError if sizes don't fit.
    """
    on = devices() if on is None else on
    shape = sizes(c, len(on))
    if len(on) == 1:
        return None
    kinds = (AxisType.Explicit if c.axis_type == "explicit" else AxisType.Auto,) * len(AXES)
    if isinstance(on[0], Described):
        return jax.sharding.AbstractMesh(tuple(shape.values()), AXES, axis_types=kinds)
    return jax.sharding.Mesh(device_order.arrange(on, shape), AXES, axis_types=kinds)


def constrain(tree: Any, shardings: Any) -> Any:
    """Returns a tree of arrays, each constrained to its sharding."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.tree.map(
        jax.reshard if mesh.are_all_axes_explicit else jax.lax.with_sharding_constraint, tree, shardings
    )


def on_mesh(mesh: jax.sharding.Mesh | None) -> Any:
    """Returns the context in which programs are traced: it sets the mesh, or nothing for a single device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def is_explicit() -> bool:
    """Returns whether a program is traced for a mesh whose axes are part of the types of arrays."""
    return jax.sharding.get_abstract_mesh().are_all_axes_explicit


def spec_of(x: jax.Array) -> tuple[Any, ...]:
    """Returns the axes of an explicit mesh that an array's dimensions lie on; of another mesh nothing is known, and
    all are None."""
    return tuple(jax.typeof(x).sharding.spec) if is_explicit() else (None,) * x.ndim


def reshape(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> jax.Array:
    """Reshapes an array whose dimensions then lie on the axes `spec` of an explicit mesh: JAX can't tell by itself."""
    return jax.lax.reshape(x, shape, out_sharding=P(*spec) if is_explicit() else None)


_mapped: contextvars.ContextVar[bool] = contextvars.ContextVar("mapped", default=False)


@contextlib.contextmanager
def mapped_over_replica() -> Iterator[None]:
    """Marks what is traced within its context as the program of one part of the `replica` axis, which `jax.vmap` maps
    over all."""
    token = _mapped.set(True)
    try:
        yield
    finally:
        _mapped.reset(token)


def is_mapped() -> bool:
    """Returns whether a program is traced within `mapped_over_replica`. JAX can't then check what differs between the
    devices of a `shard_map`, nor map one of a part of the axes."""
    return _mapped.get()


def replicated(mesh: jax.sharding.Mesh | None) -> Any:
    """Returns the sharding of an array that every device has whole."""
    return single_device_sharding() if mesh is None else NamedSharding(mesh, P())


def check_host_memory(device: Any) -> None:
    """Raises ValueError if a device can't reach the host's memory.

    Devices that programs are only compiled for, and don't say, are taken to reach it.
    """
    try:
        kinds = [m.kind for m in device.addressable_memories()]
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return
    if kinds and "pinned_host" not in kinds:
        raise ValueError(
            f"execution.offload: {device.platform} has no pinned host memory, only {', '.join(kinds)}; drop it"
        )
