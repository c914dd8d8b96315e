"""Records the choices that a run makes for its program, and describes them for people."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from jaxlm.core import config
from jaxlm.core.spec import is_spec
from jaxlm.nn import attention, block_stack, context_parallel, matmul, moe, pipeline, remat
from jaxlm.nn.family import Family, RunsItself
from jaxlm.nn.kernels import few_bit_matmul
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask
from jaxlm.runtime import compiler_options as compiler
from jaxlm.runtime import device_order, processes
from jaxlm.runtime import mesh as meshes
from jaxlm.training.distributed import replicas
from jaxlm.training.optimizers import Optimizer
from jaxlm.weights.adapters import adapted


@dataclass(frozen=True)
class Choices:
    """A Choices holds what a run has chosen; whoever asks reads these fields, and people read `describe`."""

    devices: int
    device_kind: str
    mesh: Mapping[str, int] | None
    """Sizes of the mesh axes, outer to inner; None: one device."""
    attention: attention.AttentionChoice | None
    """None: the model runs by itself."""
    own: Mapping[str, str]
    """What such a model says of itself, by topic; empty: the run chooses."""
    dtype: str
    """The compute dtype."""
    matmul: str
    """How layers multiply, in words; empty: in the compute dtype."""
    few_bits: str
    """How a few rows are multiplied by frozen matrices of int8 and int4, in words; empty: there are none."""
    scanned: bool
    """Whether layers are a loop of the program."""
    remat: str
    offload: tuple[str, ...]
    """What waits in the host's memory."""
    experts: moe.MoeChoice | None
    slices: str
    """Which mesh axes cross slices, in words; empty: none does."""
    zero: int | None
    """The ZeRO stage of a mesh with an fsdp axis."""
    context: context_parallel.ContextChoice | None
    pipeline: pipeline.PipelineChoice | None
    processes: str
    """Who started how many processes, in words; empty: nobody."""
    adapter: str
    """What the adapter trains, in words; empty: there is none."""
    optimizer_groups: Mapping[str, str]
    """Path of every parameter → what happens to it."""
    flags: Mapping[str, compiler.Option]
    """Compiler options of the train step."""

    def describe(self, one_document: bool = False) -> dict[str, str]:
        """Returns the choices as people read them, by topic: printed once and stored in the run's log. `one_document`
        says whether each row is known to be one."""
        mesh = "one device"
        if self.mesh is not None:
            mesh = " × ".join(f"{axis} {n}" for axis, n in self.mesh.items() if n > 1)
        notes = {
            "devices": f"{self.devices} × {self.device_kind}",
            "mesh": mesh,
        }
        if self.attention is None:
            notes |= self.own
        else:
            notes |= {
                "attention": self.attention.describe(one_document),
                "precision": ", ".join(filter(None, ("float32 weights", self.matmul, f"{self.dtype} compute"))),
                "layers": f"{'scanned' if self.scanned else 'unrolled'}, remat {self.remat}",
            }
        if self.few_bits:
            notes["int8 and int4"] = f"matrices are {self.few_bits}"
        if self.offload:
            notes["offload"] = f"{', '.join(self.offload)} to the host's memory"
        if self.experts is not None:
            notes["experts"] = self.experts.describe()
        if self.slices:
            notes["slices"] = self.slices
        if self.zero is not None:
            sharded = ("the optimizer's state", "gradients", "weights")[: self.zero]
            notes["fsdp"] = f"shards {', '.join(sharded)} (ZeRO {self.zero})"
        if self.context is not None:
            notes["context"] = self.context.describe()
        if self.pipeline is not None:
            notes["pipeline"] = self.pipeline.describe()
        if self.processes:
            notes["processes"] = self.processes
        if self.adapter:
            notes["adapter"] = self.adapter
        for group in sorted(set(self.optimizer_groups.values())):
            paths = [path for path, other in self.optimizer_groups.items() if other == group]
            notes[f"optimizer: {group}"] = "on " + " ".join(paths)
        if self.flags:
            notes["flags"] = compiler.format_options(dict(self.flags))
        return notes


def has_few_bits(run: config.Run) -> bool:
    """Returns whether a run has frozen matrices of int8 or int4 that a few rows may be multiplied by as they are."""
    formats = [how.format for how in run.compression.by_path().values()]
    stored = any(f is not None and f.kind in few_bit_matmul.KINDS and not f.dynamic for f in formats)
    return stored or run.adapter.base in few_bit_matmul.KINDS


def choose(
    run: config.Run,
    family: Family,
    layout: Layout,
    mesh: jax.sharding.Mesh | None,
    specs: dict,
    adapter: adapted.Adapted,
    optimizer: Optimizer,
    flags: Mapping[str, compiler.Option],
) -> Choices:
    """Makes a run's choices. Raises ValueError where the run asks for what can't be had on these devices."""
    devices, seq_len = meshes.devices(), run.train.seq_len
    context_devices = layout.ways("seq", mesh)
    workers = replicas.workers(run)
    attention_choice, own = None, {}
    if isinstance(family, RunsItself):
        family.check_layout(run.model, layout)
        own = dict(family.describe(run.model, run.execution.dtype))
    else:
        attention_choice = attention.choose(
            run.execution.attention,
            Mask(family.generates, common=adapter.num_common_keys, packed=not adapter.layout(layout).shared_keys),
            False, None, run.execution.dtype, split=run.mesh.context_by if context_devices > 1 else "",
            lengths=(seq_len, seq_len), mapped=max(workers, 1 if mesh is None else mesh.shape[pipeline.AXIS]) > 1,
        )  # fmt: skip
    depths = [s.shape[0] for s in jax.tree.leaves(adapter.base, is_leaf=is_spec) if s.axes[:1] == ("layers",)]
    shortest = None if isinstance(family, RunsItself) else min(depths)
    multiplied = matmul.choose(run.execution, shortest, 1 if mesh is None else mesh.shape["stage"])
    remat.remat_policy(run.execution)  # refuses what can't be offloaded
    if run.execution.offload:
        meshes.check_host_memory(devices[0])
    return Choices(
        devices=len(devices),
        device_kind=devices[0].device_kind,
        mesh=None if mesh is None else dict(mesh.shape),
        attention=attention_choice,
        own=own,
        dtype=run.execution.dtype,
        matmul=multiplied,
        few_bits=few_bit_matmul.choose().description if has_few_bits(run) else "",
        scanned=block_stack.scanned(layout),
        remat=run.execution.remat,
        offload=run.execution.offload,
        experts=None if run.model.moe is None else moe.choose(run.model.moe, layout, mesh),
        slices="" if mesh is None else device_order.describe_crossing(mesh),
        zero=run.mesh.zero if mesh is not None and mesh.shape["fsdp"] > 1 else None,
        context=context_parallel.ContextChoice(context_devices, run.mesh.context_by) if context_devices > 1 else None,
        pipeline=pipeline.choose(layout, mesh, adapter.base, run.train),
        processes=processes.describe_launcher(),
        adapter=adapter.summary(specs, optimizer.trainable) if adapter.changes else "",
        optimizer_groups=optimizer.groups,
        flags=flags,
    )
