"""What a set of compiler options (`execution.flags`) changes in a compiled step of the kind that it is for: of each
preset, and of sets that are recommended elsewhere.

    python benchmarks/presets.py [--sets tpu_sparse_core tpu_reduce_scatter]

`pip install "jax[cuda13]" libtpu` brings the compilers; nothing runs. A step is compiled without the preset and with
it, for a machine that isn't here. Of both: the bytes of a device, the bytes that it sends, the share of these that
travels while kernels run that were put between a collective's beginning and its end, and what the compiler estimates
for all kernels (TPUs) or how many there are (GPUs). Fails where a compiler refuses a preset.

Kernels under which something travels are a necessary condition: they say that the schedule overlaps, not for how long.
"""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

from aot_qlora import compilers
from worker import HERE, save, table

from jaxlm.core import config
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, hlo, targets
from jaxlm.runtime import compiler_options
from jaxlm.training import environment

MODEL = llama.Config(vocab=16384, layers=4, width=2048, heads=16, kv_heads=8, head_width=128, ffn=5632)
SEQ = 2048
FSDP = config.Mesh(fsdp=-1)
FULL = {"remat": "full"}
Case = tuple[str, config.Mesh, int, dict[str, Any]]
"""Machine, mesh, rows of a device, further settings of `execution`."""
ON_V6E = [("v6e:2x4", FSDP, 1, FULL)]
TRIED: dict[str, list[str]] = {
    "collectives of GPUs under products": [
        "xla_gpu_enable_latency_hiding_scheduler=true", "xla_gpu_enable_while_loop_double_buffering=true",
        "xla_gpu_all_gather_combine_threshold_bytes=1073741824",
        "xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
        "xla_gpu_all_reduce_combine_threshold_bytes=1073741824",
    ],
    "products of GPUs that begin with the part that has arrived": [
        "xla_gpu_multi_streamed_windowed_einsum=true", "xla_gpu_threshold_for_windowed_einsum_mib=0",
    ],
    "sends of a GPU's stages": [
        "xla_gpu_enable_pipelined_p2p=true", "xla_gpu_collective_permute_decomposer_threshold=1024",
    ],
    "no graphs of GPUs": ["xla_gpu_enable_command_buffer="],
    "larger tiles of a TPU's products": ["xla_tpu_scoped_vmem_limit_kib=98304"],
    "gathers of TPUs inside products": [
        "xla_tpu_enable_async_collective_fusion=true", "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps=true", "xla_tpu_overlap_compute_collective_tc=true",
        "xla_enable_async_all_gather=true",
    ],
    "gradients between slices of TPUs": [
        "xla_tpu_enable_data_parallel_all_reduce_opt=true", "xla_tpu_data_parallel_opt_different_sized_ops=true",
    ],
    "activations on a TPU's host": [
        "xla_tpu_enable_all_experimental_scheduler_features=true",
        "xla_tpu_enable_scheduler_memory_pressure_tracking=true", "xla_tpu_host_transfer_overlap_limit=24",
        "xla_tpu_aggressive_opt_barrier_removal=ENABLED", "xla_lhs_prioritize_async_depth_over_stall=ENABLED",
        "xla_tpu_enable_ag_backward_pipelining=true",
        "xla_should_allow_loop_variant_parameter_in_chain=ENABLED",
        "xla_should_add_loop_invariant_op_in_chain=ENABLED", "xla_max_concurrent_host_send_recv=100",
        "xla_tpu_scheduler_percent_shared_memory_limit=100", "xla_latency_hiding_scheduler_rerun=2",
    ],
}  # fmt: skip
"""Sets of options that are recommended elsewhere and are no presets: what they changed here was nothing or worse."""
CASES: dict[str, list[Case]] = {
    "tpu_sparse_core": ON_V6E,
    "tpu_reduce_scatter": ON_V6E,
    "collectives of GPUs under products": [("h100:8", FSDP, 2, FULL)],
    "products of GPUs that begin with the part that has arrived": [("h100:8", config.Mesh(tensor=8), 2, FULL)],
    "sends of a GPU's stages": [("h100:8", config.Mesh(stage=4, fsdp=2), 4, FULL)],
    "no graphs of GPUs": [("h100", config.Mesh(), 2, FULL)],
    "larger tiles of a TPU's products": [("v6e:1x1", config.Mesh(), 1, FULL)],
    "gathers of TPUs inside products": [*ON_V6E, ("v5p:2x2x2", FSDP, 1, FULL)],
    "gradients between slices of TPUs": [("2*v6e:2x2", config.Mesh(data=2, fsdp=4), 1, FULL)],
    "activations on a TPU's host": [
        ("v6e:1x1", config.Mesh(), 1, {"remat": "attention", "offload": ("q", "k", "v")})
    ],
}  # fmt: skip


def step_of(case: Case, flags: tuple[str, ...]) -> dict[str, Any]:
    """Compiles a step and returns what it costs."""
    machine, mesh, rows, execution = case
    t = targets.parse(machine)
    micro = 8 if mesh.stage > 1 else 1
    replicas = t.count // max(1, mesh.tensor * mesh.stage)
    run = config.Run(
        name="preset", model=MODEL, objective=causal.Config(), mesh=mesh,
        train=config.Train(batch_size=rows * replicas * micro, micro_batches=micro, seq_len=SEQ),
        execution=config.Execution(flags=flags, **execution),
    )  # fmt: skip
    made = ahead_of_time.compile_step(run, t)
    sent, hidden = overlap(made.module)
    memory = made.executable.memory_analysis()
    return {
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "sent_gb": sent / 1e9,
        "under_kernels": hidden / sent if sent else None,
        "gcycles": made.module.estimated_cycles / 1e9 or None,
        "kernels": made.module.kernels,
        "host_gb": made.module.host_traffic / 1e9,
        "compile_s": round(made.seconds, 1),
    }


def overlap(module: hlo.Module) -> tuple[float, float]:
    """Returns the bytes that a device sends, and those of them that travel while kernels run."""
    sent = [(c.sent, c.under > 0) for c in module.collectives]
    return sum(n for n, _ in sent), sum(n for n, hidden in sent if hidden)


def tried(case: Case, flags: tuple[str, ...]) -> dict[str, Any]:
    """Returns what a step costs, or why the compiler refuses it."""
    try:
        return step_of(case, flags)
    except (ValueError, ahead_of_time.Refused) as e:
        return {"refused": str(e)[:400]}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sets", nargs="+", default=list(CASES), choices=CASES, help="presets, and sets that are none")
    p.add_argument("--save", default="presets", help="name under results/; - : don't save")
    a = p.parse_args()
    file = HERE / "results" / f"{a.save}.json"
    before = json.loads(file.read_text("utf-8")) if a.save != "-" and file.exists() else {}
    found: dict[str, dict[str, Any]] = before.get("found", {})
    plain: dict[str, dict[str, Any]] = {}
    rows, refused = [], False
    for name in a.sets:
        for case in CASES[name]:
            key = f"{name} on {case[0]}"
            how = repr(case)
            plain[how] = plain.get(how) or tried(case, ())
            found[key] = {"without": plain[how], "with": tried(case, tuple(TRIED.get(name, [name])))}
            refused |= name in compiler_options.PRESETS and any("refused" in one for one in found[key].values())
            for which, one in found[key].items():
                rows.append([key, which, *(one.get(column) for column in COLUMNS), one.get("refused", "")[:60]])
            print(table(rows[-2:], ["preset", "", *COLUMNS, "refused"]), flush=True)
            if a.save != "-":
                save(a.save, {
                    "what": "steps compiled without and with presets of compiler options; nothing ran",
                    "model": dataclasses.asdict(MODEL), "positions": SEQ,
                    "cases": {n: [repr(c) for c in cases] for n, cases in CASES.items()},
                    "versions": environment.environment()["versions"] | compilers(), "found": found,
                })  # fmt: skip
    print(table(rows, ["preset", "", *COLUMNS, "refused"]))
    return int(refused)


COLUMNS = ["temporary_gb", "sent_gb", "under_kernels", "gcycles", "kernels", "host_gb", "compile_s"]


if __name__ == "__main__":
    sys.exit(main())
