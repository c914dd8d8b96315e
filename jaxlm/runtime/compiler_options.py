"""A run may ask options of XLA beyond its defaults; they are data, and are checked before anything is compiled.

`XLA_FLAGS` and `LIBTPU_INIT_ARGS` hold for a whole process, and a name that the compiler doesn't know aborts it. The
options here are given to the train step alone, and an unknown one is a ValueError that names the nearest. Nothing here
sets a variable: those of NCCL and of memory belong to launch scripts, and are recorded with the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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


GPU = partial(Preset, "gpu", ())
TPU = partial(Preset, "tpu")
NEW_TPUS = ("TPU v5p", "TPU v5", "TPU v6 lite", "TPU v6e", "TPU7x")
SPARSE_CORE = ("TPU v6 lite", "TPU v6e", "TPU7x")

# The compilers of jax 0.10.2 and its libtpu accept every name here, for an H100 and a TPU v6e (`benchmarks/flags.py`
# asks them without such a device). That says that they parse, not that they make a step faster: measure each one.
PRESETS: dict[str, Preset] = {
    "gpu_overlap": GPU(
        {
            "xla_gpu_enable_latency_hiding_scheduler": True,
            "xla_gpu_enable_pipelined_all_gather": True,
            "xla_gpu_enable_pipelined_reduce_scatter": True,
            "xla_gpu_enable_pipelined_all_reduce": True,
            "xla_gpu_enable_while_loop_double_buffering": True,
            "xla_gpu_all_gather_combine_threshold_bytes": 1 << 30,
            "xla_gpu_reduce_scatter_combine_threshold_bytes": 1 << 27,
            "xla_gpu_all_reduce_combine_threshold_bytes": 1 << 30,
        },
        "collectives under matrix products; thresholds should exceed one layer's weights, which they hold in memory",
    ),
    "gpu_collective_matmul": GPU(
        {"xla_gpu_multi_streamed_windowed_einsum": True, "xla_gpu_threshold_for_windowed_einsum_mib": 0},
        "tensor parallelism: a product begins with the part that has arrived",
    ),
    "gpu_pipeline": GPU(
        {"xla_gpu_enable_pipelined_p2p": True, "xla_gpu_collective_permute_decomposer_threshold": 1024},
        "pipeline stages: sends under computation",
    ),
    "gpu_no_graphs": GPU({"xla_gpu_enable_command_buffer": ""}, "no CUDA graphs, which hold memory of their own"),
    "gpu_deterministic": GPU(
        {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": 0},
        "the same bits from the same program on the same device; slower",
    ),
    "tpu_vmem": TPU(
        ("TPU v6 lite", "TPU v6e"), {"xla_tpu_scoped_vmem_limit_kib": 98304}, "larger tiles of matrix products"
    ),
    "tpu_overlap": TPU(
        NEW_TPUS,
        {
            "xla_tpu_enable_async_collective_fusion": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
            "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
            "xla_tpu_overlap_compute_collective_tc": True,
            "xla_enable_async_all_gather": True,
        },
        "gathers of FSDP inside the products that use them",
    ),
    "tpu_sparse_core": TPU(
        SPARSE_CORE,
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
        "collectives on the sparse cores, beside the products; instead of tpu_overlap",
    ),
    "tpu_reduce_scatter": TPU(
        (),
        {"xla_tpu_reduce_scatter_collective_matmul_mode": "post_spmd"},
        "FSDP's gradients summed in a ring inside the products that make them: fewest bytes, more work for the chip",
    ),
    "tpu_data_center_network": TPU(
        (),
        {
            "xla_tpu_enable_data_parallel_all_reduce_opt": True,
            "xla_tpu_data_parallel_opt_different_sized_ops": True,
        },
        "data parallelism between slices: gradients travel while others are computed",
    ),
    "tpu_host_offload": TPU(
        (),
        {
            "xla_tpu_enable_all_experimental_scheduler_features": True,
            "xla_tpu_enable_scheduler_memory_pressure_tracking": True,
            "xla_tpu_host_transfer_overlap_limit": 24,
            "xla_tpu_aggressive_opt_barrier_removal": "ENABLED",
            "xla_lhs_prioritize_async_depth_over_stall": "ENABLED",
            "xla_tpu_enable_ag_backward_pipelining": True,
            "xla_should_allow_loop_variant_parameter_in_chain": "ENABLED",
            "xla_should_add_loop_invariant_op_in_chain": "ENABLED",
            "xla_max_concurrent_host_send_recv": 100,
            "xla_tpu_scheduler_percent_shared_memory_limit": 100,
            "xla_latency_hiding_scheduler_rerun": 2,
        },
        "activations that rest on the host travel under computation",
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

    Raises ValueError for an unknown name, with the nearest known one, and for a wrong value.
    """
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((8, 128), "float32", sharding=sharding)
    program = jax.jit(lambda x: x + 1, out_shardings=sharding).lower(number)
    untyped: Any = options  # jax takes numbers too, whatever its annotation says
    try:
        program.compile(compiler_options=untyped)
    except jax.errors.JaxRuntimeError as error:
        for name, value in options.items():
            if f"No such compile option: '{name}'" in str(error):
                close = nearest(name, {n for p in PRESETS.values() for n in p.options})
                hint = close if "did you mean" in close else "; see the compiler's own list of flags"
                raise ValueError(
                    f"execution.flags: the compiler for {device.device_kind} knows no {name!r}{hint}"
                ) from None
            if f"option {name}," in str(error):
                raise ValueError(f"execution.flags: {_format(value)!r} is no value for {name}") from None
        raise ValueError(f"execution.flags: the compiler for {device.device_kind} refuses {format_options(options)}: "
                         f"{one_line(error, 300)}") from None  # fmt: skip
