"""Compiler options as data: what a run asks of XLA beyond its defaults, checked before anything is compiled.

`XLA_FLAGS` and `LIBTPU_INIT_ARGS` hold for a whole process, and a name that the compiler doesn't know aborts it. These
are given to the train step alone, and an unknown one is a ValueError that names the nearest. Nothing here sets a
variable: those of NCCL and of memory belong to launch scripts, and are recorded with the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxlm.core.errors import nearest

Option = bool | int | float | str


@dataclass(frozen=True)
class Preset:
    """Options that go together."""

    platform: str
    """As JAX calls the devices: gpu, tpu, cpu."""
    kinds: tuple[str, ...]
    """Beginnings of the names of devices that have what these options are about; empty: all of the platform."""
    options: dict[str, Option]
    why: str


GPU = partial(Preset, "gpu", ())
TPU = partial(Preset, "tpu")
NEW_TPUS = ("TPU v5p", "TPU v5", "TPU v6 lite", "TPU v6e", "TPU7x")
SPARSE_CORE = ("TPU v6 lite", "TPU v6e", "TPU7x")

# Every name here was accepted by the compilers of jax 0.10.2 and its libtpu, for an H100 and for a TPU v6e that weren't
# there (`benchmarks/flags.py`): that they parse, not that they pay. Measure before you keep one.
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


def options(flags: Sequence[str], device: Any) -> dict[str, Option]:
    """Of presets and NAME=VALUE, the later winning; for `device`, whose compiler has accepted each. (Of a device that
    is but described, by arithmetic, there is none to ask.)

    Raises ValueError for what is neither, for a preset of other devices, for an unknown name and for a wrong value.
    """
    found: dict[str, Option] = {}
    for flag in flags:
        name, given, value = flag.removeprefix("--").partition("=")
        if given:
            found[name] = _typed(value)
        elif name not in PRESETS:
            raise ValueError(f"execution.flags: {flag!r} is neither NAME=VALUE nor a preset{nearest(name, PRESETS)}")
        else:
            found |= _fitting(name, device).options
    if found and hasattr(device, "client"):
        _accepted(found, device)
    return found


def told(found: dict[str, Option]) -> str:
    return " ".join(f"{name}={_shown(value)}" for name, value in found.items())


def _typed(value: str) -> Option:
    """XLA takes a truth value and a number as such, not as their words."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _shown(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fitting(name: str, device: Any) -> Preset:
    preset = PRESETS[name]
    if device.platform != preset.platform or (preset.kinds and not device.device_kind.startswith(preset.kinds)):
        meant = ", ".join(preset.kinds) or f"every {preset.platform}"
        raise ValueError(
            f"execution.flags: {name} is for {meant}, and this run is on {device.platform} {device.device_kind}; "
            "leave it out"
        )
    return preset


def _accepted(found: dict[str, Option], device: Any) -> None:
    """Ask the compiler, with a program of one addition."""
    import jax

    home = jax.sharding.SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((8, 128), "float32", sharding=home)
    program = jax.jit(lambda x: x + 1, out_shardings=home).lower(number)
    options: Any = found  # numbers are taken too, whatever its annotation says
    try:
        program.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        for name, value in found.items():
            if f"No such compile option: '{name}'" in str(error):
                close = nearest(name, {n for p in PRESETS.values() for n in p.options})
                hint = close if "did you mean" in close else "; see the compiler's own list of flags"
                raise ValueError(
                    f"execution.flags: the compiler for {device.device_kind} knows no {name!r}{hint}"
                ) from None
            if f"option {name}," in str(error):
                raise ValueError(f"execution.flags: {_shown(value)!r} is no value for {name}") from None
        raise
