"""A run may ask options of XLA beyond its defaults; they are data, and are checked before anything is compiled.

`XLA_FLAGS` and `LIBTPU_INIT_ARGS` hold for a whole process, and a name that the compiler doesn't know aborts it. The
options here are given to the train step alone, and an unknown one is a ValueError that names the nearest. Nothing here
sets a variable: those of NCCL and of memory belong to launch scripts, and are recorded with the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import nearest, one_line

Option = bool | int | float | str


@dataclass(frozen=True)
class Preset:
    """A preset is a set of options that go together."""

    platform: str
    """JAX's name of the devices: gpu, tpu or cpu."""
    kinds: tuple[str, ...]
    """Beginnings of `device_kind` that these options apply to; empty: all devices of the platform."""
    options: dict[str, Option]
    why: str


# `benchmarks/presets.py` compiles steps without and with each, and with sets of options that changed nothing.
PRESETS: dict[str, Preset] = {
    "tpu_sparse_core": Preset(
        "tpu",
        ("TPU v6 lite", "TPU v6e", "TPU7x"),
        {
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
            "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
            "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
            "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
            "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
            "xla_tpu_enable_all_gather_offload_tracing": True,
            "xla_tpu_enable_all_reduce_offload_tracing": True,
            "xla_tpu_enable_reduce_scatter_offload_tracing": True,
            "xla_tpu_use_tc_device_shape_on_sc": True,
            "xla_sc_enable_instruction_fusion": False,
            "xla_sc_disable_megacore_partitioning": True,
        },
        "collectives on the sparse cores, beside the products: hardly anything waits for FSDP's gathers, for a fifth "
        "more memory of temporaries",
    ),
    "tpu_reduce_scatter": Preset(
        "tpu",
        (),
        {"xla_tpu_reduce_scatter_collective_matmul_mode": "post_spmd"},
        "FSDP's gradients summed in a ring inside the products that make them: fewest bytes, more work for the chip",
    ),
}

RUN_ONCE: dict[str, dict[str, Option]] = {"cpu": {"xla_backend_optimization_level": 1}}
"""By platform, the options of a program that runs once, such as that which draws weights: compiling takes longer than
running it. LLVM's level 1 computes the same numbers and leaves costly passes out; level 0 rounds otherwise."""


def run_once(platform: str) -> dict[str, Option] | None:
    """Returns the options of a program that runs once; None where there are none, or where JAX optimizes less still."""
    import jax

    return None if jax.config.values["jax_disable_most_optimizations"] else RUN_ONCE.get(platform)


def options(flags: Sequence[str], device: Any) -> dict[str, Option]:
    """Returns the options of presets and NAME=VALUE flags, of which the later wins.

    The compiler for `device` is asked whether it accepts each; a `mesh.Described` device has none to ask. Raises
    ValueError for a flag that is neither, a preset for other devices, an unknown name, and a wrong value.
    """
    result: dict[str, Option] = {}
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if equals:
            result[name] = _parse(value)
        elif name not in PRESETS:
            raise ValueError(f"execution.flags: {flag!r} is neither NAME=VALUE nor a preset{nearest(name, PRESETS)}")
        else:
            result |= _preset_for(name, device).options
    if result and hasattr(device, "client"):  # jax's own devices have a client, and with it a compiler
        check_accepted(result, device)
    return result


def format_options(options: dict[str, Option]) -> str:
    """Returns options as NAME=VALUE, separated by spaces."""
    return " ".join(f"{name}={_format(value)}" for name, value in options.items())


def _parse(value: str) -> Option:
    """Returns a truth value or a number as such, for XLA doesn't take them as text."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _format(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _preset_for(name: str, device: Any) -> Preset:
    preset = PRESETS[name]
    if device.platform != preset.platform or (preset.kinds and not device.device_kind.startswith(preset.kinds)):
        devices = ", ".join(preset.kinds) or f"every {preset.platform}"
        raise ValueError(
            f"execution.flags: {name} is for {devices}, and this run is on {device.platform} {device.device_kind}; "
            "leave it out"
        )
    return preset


def check_accepted(options: dict[str, Option], device: Any) -> None:
    """Asks the compiler for a device, with a program of one addition, whether it accepts options.

    Raises ValueError for an unknown name, for a wrong value, and for what the compiler won't do for this device.
    """
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((8, 128), "float32", sharding=sharding)
    program = jax.jit(lambda x: x + 1, out_shardings=sharding).lower(number)
    untyped: Any = options  # jax takes numbers too, whatever its annotation says
    try:
        program.compile(compiler_options=untyped)
    except jax.errors.JaxRuntimeError as error:
        compiler = f"the compiler for {device.device_kind}"
        why = f"{compiler} refuses {format_options(options)}: {one_line(error, 300)}"
        for name, value in options.items():
            if f"No such compile option: '{name}'" in str(error):
                why = f"{compiler} knows no {name!r}; see its own list of flags"
            elif f"option {name}," in str(error):
                why = f"{_format(value)!r} is no value for {name}"
        raise ValueError(f"execution.flags: {why}") from None
