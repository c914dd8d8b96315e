"""Estimates what a training step costs by arithmetic alone: memory, FLOPs, traffic and time of one device, in
milliseconds.

Everything follows from a `Program`'s specs and tables (`Layout`) and the chip's numbers; nothing is compiled. A
dimension that a table cuts over mesh axes is cut here too, so new kinds of parallelism mostly follow by themselves.

How parts add up (`combine`): products, and what kernels between them read and write, follow one another. Weights and
gradients move meanwhile, each network on its own, and so do activations that rest in the host's memory; its optimizer
state is waited for. Sums of activations (over tensor, experts or stages) are waited for,
as their results are needed; but a TPU's compiler splits a product over `tensor` into steps that overlap with their sum
(Wang et al. 2023, "Overlap communication with dependent computation"). A pipeline's bubble stretches it all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxlm.assembly import program, remember
from jaxlm.core import spec, tree
from jaxlm.core.spec import Spec
from jaxlm.nn import losses, matmul, pipeline
from jaxlm.planning.targets import Target
from jaxlm.training import optimizers
from jaxlm.training.distributed import outer, replicas

KEPT = "what is kept of earlier tasks"
GLOBAL, OUTER, ERROR = "global weights", "outer optimizer", "error of compression"
"""What workers that train apart hold beside their own weights."""
HOST = "copies"
"""The kind of a flow between a device and its host's memory, which no network carries."""
LAUNCH = 0.5e-6
"""Seconds between two kernels of a CUDA graph (Gray 2019, "Getting started with CUDA graphs": 3.4 µs for each kernel of
2.9)."""
KERNELS = 100
"""Kernels that a layer's forward and backward pass take on a GPU, and about as many as the rest of a step:
compiled for an H100 103 of a layer of GPT-2 and 99 of Llama's."""


@dataclass(frozen=True)
class Flow:
    """A Flow counts the bytes that one device sends in a step."""

    what: str
    kind: str
    axes: tuple[str, ...]
    sent: float
    hidden: bool
    """Whether they travel during the products, and not between them."""


@dataclass(frozen=True)
class Cost:
    """A Cost is what one device spends in one step, and the step as a whole; times are in seconds."""

    memory: dict[str, float]
    """Bytes by part."""
    flops: float
    hbm: float
    """Bytes to and from the main memory."""
    flows: tuple[Flow, ...]
    tokens: int
    """Tokens of all devices in one step."""
    model_flops: dict[str, float]
    """FLOPs a token by both conventions: see `progress.flops_per_token`."""
    narrow: float = 0.0
    """The FLOPs among these whose factors are in eight bits."""
    host: dict[str, float] = field(default_factory=dict)
    """Bytes by part that rest in the host's memory."""
    kernels: float = 0.0
    """Kernels that a GPU runs, each of which costs a gap; 0 for other devices."""
    bubble: float = 0.0
    """The share of the time that a pipeline's stage is idle."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds by resource; `step` is the whole step's. Empty where the chip's numbers aren't known."""

    @property
    def peak(self) -> float:
        """Returns the bytes of all parts together."""
        return sum(self.memory.values())

    def speed(self, count: int, flops: float) -> dict[str, float]:
        """Returns tokens/s of all devices and of one, and MFU by both conventions."""
        rate = self.tokens / self.times["step"]
        mfu = {f"mfu_{name}": rate * per / (count * flops) for name, per in self.model_flops.items()}
        return {"tokens_per_s": rate, "tokens_per_s_device": rate / count} | mfu


def ways(axes: Any, sizes: Mapping[str, int]) -> int:
    """Returns how many parts these mesh axes cut a dimension into."""
    return math.prod(sizes.get(a, 1) for a in axes)


def bandwidth(t: Target, axes: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[str, float]:
    """Returns the network, and the bytes a second that one device can send, in a collective over these axes.

    An axis whose devices don't all lie in one slice or node goes over the slower network too, where every device of the
    group's part inside carries its share. On a torus an axis has its share of the dimensions, and two links of each.
    """
    names, n = list(sizes), ways(axes, sizes)
    inner = min((math.prod(list(sizes.values())[names.index(a) + 1 :]) for a in axes), default=1)
    inside = min(n, max(1, t.near // inner)) if t.near % inner == 0 or inner < t.near else 1
    fast = t.chip.link
    if t.chip.dims:
        dims = sum(s > 1 for s in t.shape) or 1
        share = math.log(inside) / math.log(t.near) if inside > 1 else 1.0
        fast *= 2 * max(1.0, dims * share)
    near = "ICI" if t.chip.dims else "NVLink"
    if inside >= n:
        return near, fast
    slow = t.chip.network * inside
    return ("DCN" if t.chip.dims else "NIC", slow) if slow < fast else (near, fast)


def link(t: Target, flow: Flow, sizes: Mapping[str, int]) -> tuple[str, float]:
    """Returns what a flow goes over, and the bytes a second that one device can send there; 0: not known."""
    return ("host link", t.chip.to_host) if flow.kind == HOST else bandwidth(t, flow.axes, sizes)


def hidden(axes: tuple[str, ...], t: Target) -> bool:
    """Returns whether sums of activations over these axes go on during products."""
    return bool(t.chip.dims) and set(axes) <= {"tensor"}


def cost(p: program.Program, t: Target, attention: str | None = None) -> Cost:
    """Returns the cost of a program's step on a target.

    `attention` is flash or splash (fused kernels that skip what causality hides), cudnn (with a mask of all pairs) or
    xla; None takes the program's.
    """
    sizes = dict(p.mesh.shape) if p.mesh is not None else {}
    chosen = p.choices.attention  # None: a module attends by itself, of which nothing better than xla is known
    if attention is None:
        attention = chosen.implementation if chosen else "xla"
        if attention == "cudnn" and (p.one_document or (chosen and not chosen.dense)):
            attention = "flash"
    one_step = _Step(p, sizes, attention, t)
    untimed = Cost(
        memory=one_step.memory(), flops=one_step.flops(), hbm=one_step.hbm(), flows=tuple(one_step.flows()),
        tokens=p.run.train.batch_size * p.run.train.seq_len, model_flops=p.flops_per_token(), host=one_step.host(),
        kernels=one_step.kernels(), narrow=one_step.narrow(), bubble=one_step.bubble,
    )  # fmt: skip
    return combine(untimed, t, sizes)


def combine(c: Cost, t: Target, sizes: Mapping[str, int]) -> Cost:
    """Returns the cost with times, where the chip's numbers are known."""
    if not t.chip.flops or not t.chip.hbm_bandwidth:
        return c
    rate = (t.chip.low or t.chip.flops) * t.chip.efficiency  # the share of this peak that is reached was not measured
    computing = (c.flops - c.narrow) / (t.chip.flops * t.chip.efficiency) + c.narrow / rate
    times = {"compute": computing, "memory": c.hbm / t.chip.hbm_bandwidth}
    hidden_by_network: dict[str, float] = {}
    waited = copied = 0.0
    for flow in c.flows:
        network, speed = link(t, flow, sizes)
        if not speed:
            continue
        seconds = flow.sent / speed
        times[network] = times.get(network, 0.0) + seconds
        if flow.hidden:
            hidden_by_network[network] = hidden_by_network.get(network, 0.0) + seconds
        elif flow.kind == HOST:
            copied += seconds
        else:
            waited += seconds
    times["launches"] = c.kernels * LAUNCH
    device = times["compute"] + times["memory"] + times["launches"] + waited + copied
    busy = max(device, max(hidden_by_network.values(), default=0.0) + waited + copied)
    step = busy / (1 - c.bubble)
    return replace(c, times=times | {"waited": waited, "copied": copied, "bubble": step - busy, "step": step})


def outer_vectors(p: program.Program) -> int:
    """Returns how many vectors of the weights' size the outer optimizer of workers that train apart keeps."""
    like = {"w": jax.ShapeDtypeStruct((2,), "float32")}
    state = jax.eval_shape(lambda x: outer.init(p.run.distributed.outer, x), like)
    return sum(x.shape == (2,) for x in jax.tree.leaves(state))


class _Step:
    """A _Step is one training step of a program, seen from one device."""

    def __init__(self, p: program.Program, sizes: dict[str, int], attention: str, t: Target):
        self.p, self.sizes, self.attention, self.target = p, sizes, attention, t
        run, table = p.run, p.layout.compute
        self.local = replicas.workers(run) // (sizes.get(replicas.AXIS, 1) if p.apart else 1)  # they take turns
        self.micro = run.train.micro_batches * self.local
        self.bytes = p.layout.dtype.itemsize
        self.batch = ways(table.get("batch", ()), sizes)
        self.cuts = ways(table.get("seq", ()), sizes)
        self.rows = run.train.batch_size / self.micro / self.batch
        self.tokens = self.rows * run.train.seq_len / self.cuts  # those of one micro-batch
        self.flat: dict[str, Spec] = tree.flatten(p.specs, spec.is_spec)
        self.stages = sizes.get("stage", 1)
        self.bubble = 0.0
        if self.stages > 1:
            micro_batches = pipeline.micro_batches(p.layout, p.mesh, run.train.batch_size // self.micro)
            self.bubble = pipeline.bubble(self.stages, micro_batches, run.mesh.rounds)
        self.matrices = {
            path: s for path, s in self.flat.items()
            if s.is_matrix and s.role != "table"
        }  # fmt: skip
        self.layered = {path: s for path, s in self.matrices.items() if "layers" in s.axes}
        c: Any = run.model
        self.width, self.layers = c.width, c.layers
        self.heads = p.model.family.attention_width(c) / c.layers / ways(table.get("heads", ()), sizes)
        self.offload = set(run.execution.offload)
        # Extra passes of what isn't a product.
        self.recomputed = 0 if run.execution.remat == "none" and not p.choices.scanned else 1
        shared = set(table.get("experts", ())) & set(table.get("batch", ()))
        self.travel = tuple(a for a in table.get("experts", ()) if a in shared and sizes.get(a, 1) > 1)

    def stored(self, s: Spec, moments: bool = False) -> float:
        """Returns the elements of a weight that rest on one device, or of what the optimizer keeps of it."""
        table = self.p.layout.moments if moments else self.p.layout.store
        return math.prod(s.shape) / ways([m for a in s.axes for m in table.get(a or "", ())], self.sizes)

    def used(self, s: Spec) -> float:
        """Returns the elements of a weight on one device while it is multiplied with."""
        axes = [m for a in s.axes for m in self.p.layout.compute.get(a or "", ()) if a not in ("batch", "seq")]
        return math.prod(s.shape) / ways(axes, self.sizes)

    def gathered(self, s: Spec) -> tuple[str, ...]:
        """Returns the mesh axes that a weight rests over but isn't used over."""
        out: list[str] = []
        for a in s.axes:
            if a == "layers":  # each stage uses its own
                continue
            use = self.p.layout.compute.get(a or "", ())
            out += [m for m in self.p.layout.store.get(a or "", ()) if m not in use and self.sizes.get(m, 1) > 1]
        return tuple(out)

    def met(self, s: Spec) -> float:
        """Returns the share of a weight that one token is multiplied with; tokens that travel here count as this
        device's."""
        moe = self.p.run.model.moe
        if moe is None or "experts" not in s.axes:
            return 1.0
        return moe.top_k / moe.experts * ways(self.travel, self.sizes)

    def outputs(self, s: Spec) -> float:
        """Returns the elements of one token's products with a matrix of the layers, on this device."""
        numbers = optimizers.matrix_dimensions(s)
        parts = [ways(self.p.layout.compute.get(s.axes[i] or "", ()), self.sizes) for i in numbers.output_axis]
        count = self.p.run.model.moe.top_k if "experts" in s.axes else 1
        return count * self.depth(s) * math.prod(s.shape[i] for i in numbers.output_axis) / math.prod(parts)

    def depth(self, s: Spec) -> float:
        """Returns the layers on one device that have this weight."""
        return s.shape[s.axes.index("layers")] / self._stages(s) if "layers" in s.axes else 1.0

    def summed(self, s: Spec) -> tuple[str, ...]:
        """Returns the mesh axes that a product with this matrix is a sum over, as they cut its input dimensions."""
        numbers = optimizers.matrix_dimensions(s)
        cut = [m for i in numbers.reduction_axis for m in self.p.layout.compute.get(s.axes[i] or "", ())]
        if "experts" in s.axes and s.axes[-1] == "embed":
            cut += [m for m in self.p.layout.compute.get("experts", ()) if m not in self.travel]
        return tuple(m for m in cut if self.sizes.get(m, 1) > 1)

    @property
    def tied(self) -> bool:
        """Returns whether the embedding is the head too."""
        return not any(s.role == "head" for s in self.matrices.values())

    def pairs(self) -> float:
        """Returns the query–key pairs a head and token that are computed."""
        seq, causal = self.p.run.train.seq_len, self.p.model.family.kind == "decoder"
        if self.attention == "cudnn" or not causal:  # with a mask of all pairs nothing is skipped
            return float(seq)
        return seq / 2 if self.attention in ("flash", "splash") else seq * (17 / 32 if self.cuts == 1 else 1.0)

    def flops(self) -> float:
        """Returns the FLOPs of one device."""
        full = self.p.run.execution.remat == "full"
        total = 0.0
        for path, s in self.matrices.items():
            passes = 8.0 if full and path in self.layered else 6.0
            total += passes * self.met(s) * self.used(s) / self._stages(s)
        if self.tied:
            total += 6.0 * self.width * self.p.run.model.vocab / ways(self.p.layout.compute["vocab"], self.sizes)
        # Two products forward; five backward, as the scores are computed again; two more if the block is.
        passes = 2 + 5 + (2 if self.recomputed else 0)
        total += passes * 2 * self.pairs() * self.heads * self.layers / self.stages
        return total * self.tokens * self.micro

    def narrow(self) -> float:
        """Returns the FLOPs of one device that layers spend in eight bits; what rounds the factors is not counted."""
        e, total = self.p.run.execution, 0.0
        for s in self.layered.values():
            n = s.shape[0]
            if s.role == "matrix" and "experts" not in s.axes and e.matmul != "dtype":
                passes = 4.0 if e.matmul == "int8" else 6.0  # gradients of weights are not in int8
                passes += 2.0 if e.remat == "full" else 0.0
                share = sum(matmul.is_narrow(e, i, n) for i in range(n)) / n
                total += passes * share * self.used(s) / self._stages(s)
        return total * self.tokens * self.micro

    def _stages(self, s: Spec) -> int:
        layers = self.p.layout.compute.get("layers", ())
        return self.stages if "layers" in s.axes and "stage" not in layers else 1

    def hbm(self) -> float:
        """Returns the bytes of traffic: between the products (norms, residuals, gates, rotations), scores that no fused
        kernel keeps, the update."""
        outputs = sum(self.outputs(s) for s in self.layered.values())
        width = 10 * self.width * self.layers / self.stages
        between = (width + 1.5 * outputs) * self.bytes * (3 + self.recomputed)
        scores = 0.0
        if self.attention == "xla":
            scores = 12.0 * self.pairs() * self._heads() * self.layers / self.stages * (4 + self.recomputed)
        weights = sum(4 * self.stored(s) for path, s in self.flat.items() if self.p.optimizer.trainable(path))
        state = self.moments()
        weights *= self.local
        update = 5 * weights + 2 * state  # weights and state read and written, gradients written and read twice
        return (between + scores) * self.tokens * self.micro + update

    def _heads(self) -> float:
        c: Any = self.p.run.model
        return c.heads / ways(self.p.layout.compute.get("heads", ()), self.sizes)

    def _moments(self) -> dict[str, float]:
        """Returns the bytes of the optimizer's state by weight."""
        shapes, _ = tree.partition(spec.abstract(self.p.specs), self.p.optimizer.trainable)
        parts = tree.map_named(
            lambda path, x: math.prod(x.shape) / max(1.0, self.stored(self.flat[path], moments=True)), shapes
        )
        state = jax.eval_shape(self.p.optimizer.tx.init, shapes)
        cuts = optimizers.state_shardings(self.p.optimizer.tx, shapes, parts, 1.0)
        bytes_by_path: dict[str, float] = {}
        for (path, leaf), part in zip(
            jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(cuts), strict=True
        ):
            name = jax.tree_util.keystr(path)
            bytes_by_path[name] = self.local * leaf.size * leaf.dtype.itemsize / part
        return bytes_by_path

    def memory(self) -> dict[str, float]:
        """Returns bytes by part. What a block needs while it runs, and a loss, is counted once: they don't exist at the
        same time."""
        rest = sum(self.copies(path) * self.rests(s) for path, s in self.flat.items())
        grads = sum(4 * self.stored(s) for path, s in self.flat.items() if self.p.optimizer.trainable(path))
        remat = self.p.run.execution.remat
        outputs = sum(self.outputs(s) for s in self.layered.values())
        own_layers = self.layers / self.stages
        width, attended, qkv = self.width * own_layers, self.heads * own_layers, self.qkv()
        # Kept are a block's input and all products but the last, which is as large, and without remat attention's
        # results; what lies between is made again (`but_cheap`).
        kept = {"full": width, "dots": outputs, "none": outputs + attended}
        named = {"attention": 2 * width + qkv + attended, "qkv": width + qkv}
        cached = self.bytes * (kept | named)[remat] - self.offloaded()
        # A layer's activations and their gradients, and the weights of two layers: one is gathered ahead.
        block = self.tokens * 2 * self.bytes * (6 * width + 2 * outputs) / own_layers
        block += 2 * self.bytes * sum(self.used(s) / self._stages(s) for s in self.layered.values()) / own_layers
        if self.attention == "xla":
            queries = self.p.run.train.seq_len / (16 if self.cuts == 1 else self.cuts)
            block += 10 * self.rows * self._heads() * queries * self.p.run.train.seq_len
        table = self.width * self.p.run.model.vocab / ways(self.p.layout.compute["vocab"], self.sizes)
        logits = 4 * self.tokens * self.p.run.model.vocab / ways(self.p.layout.compute["vocab"], self.sizes)
        chunk = min(logits, losses.logit_bytes(self.target.chip.kind))
        loss = table * (2 * self.bytes + 4) + 2.5 * chunk + self.tokens * self.width * (4 + self.bytes)
        ema = sum(4 * self.stored(s) for s in self.flat.values()) if self.p.run.optim.ema else 0.0
        return {
            "parameters": rest, "optimizer state": ("optimizer" not in self.offload) * self.moments() + ema,
            "gradients": grads * (2 if self.p.run.train.micro_batches > 1 else 1),
            "activations": self.tokens * cached, "working memory": max(block, loss),
        } | ({KEPT: earlier} if (earlier := self.kept(rest)) else {}) | self.of_workers()  # fmt: skip

    def moments(self) -> float:
        """Returns the bytes of the optimizer's state on one device."""
        return sum(self._moments().values())

    def qkv(self) -> float:
        """Returns the elements of one token's queries, keys and values in the layers of one device."""
        return sum(
            self.outputs(s) for s in self.layered.values() if {"heads", "kv"} & {*s.axes} and s.axes[-1] != "embed"
        )

    def offloaded(self) -> float:
        """Returns the bytes of one token's activations that rest in the host's memory."""
        width, attended = self.width * self.layers / self.stages, self.heads * self.layers / self.stages
        keys = (self.qkv() - attended) / 2
        each = {"input": width, "q": attended, "k": keys, "v": keys, "attended": attended, "o": width}
        return self.bytes * sum(number for name, number in each.items() if name in self.offload)

    def host(self) -> dict[str, float]:
        """Returns the bytes by part that rest in the host's memory."""
        parts = {"optimizer state": ("optimizer" in self.offload) * self.moments(),
                 "activations": self.tokens * self.offloaded()}  # fmt: skip
        return {name: n for name, n in parts.items() if n}

    def kernels(self) -> float:
        """Returns how many kernels a GPU runs; 0 for other devices."""
        return KERNELS * (self.layers / self.stages + 1) * self.micro if self.target.chip.platform == "gpu" else 0.0

    def rests(self, s: Spec) -> float:
        """Returns the bytes of a weight that rest on one device."""
        return self.stored(s) * jax.numpy.dtype(s.dtype).itemsize

    def copies(self, path: str) -> int:
        """Returns how many workers of one device have a weight of their own; those that are frozen all share."""
        return self.local if self.p.optimizer.trainable(path) else 1

    def of_workers(self) -> dict[str, float]:
        """Returns the bytes by part that workers that train apart hold beside their weights and moments."""
        c = self.p.run.distributed
        if not self.p.apart:
            return {}
        trained = [s for path, s in self.flat.items() if self.p.optimizer.trainable(path)]
        weights = 4 * sum(map(self.stored, trained))
        errors = self.local * sum(map(self.rests, trained)) if c.compress != "none" and c.error_decay else 0.0
        parts = {GLOBAL: weights, OUTER: outer_vectors(self.p) * weights, ERROR: errors}
        return {name: n for name, n in parts.items() if n}

    def kept(self, weights: float) -> float:
        """Returns the bytes of what methods of continual learning and a teacher hold beside the weights, whose bytes
        are given."""
        trained = sum(4 * self.stored(s) for path, s in self.flat.items() if self.p.optimizer.trainable(path))
        trees = (
            remember.kept_trees(self.p.earlier, trained, trained / 4, weights),
            self.p.earlier.tracks_like(trained, trained / 4),
        )
        taught = {} if self.p.teacher is None or not self.p.teacher.reads_each_batch else self.p.teacher.specs
        leaves = tree.flatten(taught, spec.is_spec).values()
        teacher = sum(np.dtype(s.dtype).itemsize * self.stored(s) for s in leaves)
        return float(sum(jax.tree.leaves(trees)) + teacher)

    def flows(self) -> list[Flow]:
        """Returns what one device sends."""
        totals: dict[tuple[str, str, tuple[str, ...], bool], float] = {}

        def add(what: str, kind: str, axes: tuple[str, ...], whole: float, hidden: bool) -> None:
            n = ways(axes, self.sizes)
            if n > 1 and whole:
                rounds = 2 if kind == "all-reduce" else 1
                key = what, kind, axes, hidden
                totals[key] = totals.get(key, 0.0) + rounds * whole * (n - 1) / n

        dense = [*self.p.layout.compute.get("batch", ()), *self.p.layout.compute.get("seq", ())]
        dense = [a for a in dense if a != replicas.AXIS] if self.p.apart else dense
        each = self.tokens * self.width * self.bytes * self.micro
        for path, s in self.flat.items():
            axes, n = self.gathered(s), ways(self.gathered(s), self.sizes)
            if s.role == "table":  # rows travel, not the table; but a tied head gathers it
                add("rows looked up", "all-to-all", axes, 2 * each, False)
                if "vocab" not in s.axes or not self.tied:
                    axes = ()
            gathered_bytes = self.used(s) / self._stages(s) * self.bytes
            gathers = 2 if "layers" in s.axes else 1  # no block keeps whole weights for its backward pass
            add("weights", "all-gather", axes, gathered_bytes * gathers * self.micro, True)
            if not self.p.optimizer.trainable(path):
                continue
            add("gradients", "reduce-scatter", tuple(a for a in axes if a in dense), gathered_bytes * self.micro, True)
            storing = [m for a in s.axes for m in self.p.layout.store.get(a or "", ())]
            others = tuple(a for a in dense if a not in storing and self.sizes.get(a, 1) > 1)
            add("gradients", "all-reduce", others, gathered_bytes / n * self.micro, True)
        extra_passes = 1 if self.p.run.execution.remat == "full" else 0
        for s in self.layered.values():
            if axes := self.summed(s):  # forward, forward again, and backward what the block's first products give
                whole = (2 + extra_passes) * self.depth(s) * each
                add("activations", "all-reduce", axes, whole, hidden(axes, self.target))
            if "experts" in s.axes and s.axes[-1] == "embed":  # to the experts and back, forward and backward
                pairs = self.p.run.model.moe.top_k * each
                add("tokens", "all-to-all", self.travel, 2 * (2 + extra_passes) * self.depth(s) * pairs, False)
        seq = tuple(a for a in self.p.layout.compute.get("seq", ()) if self.sizes.get(a, 1) > 1)
        if seq:
            kv = sum(self.outputs(s) for s in self.layered.values() if "kv" in s.axes)
            whole = self.tokens * self.cuts * kv * self.bytes * self.micro
            add("keys and values", "all-gather", seq, whole * (1 + self.recomputed), False)
            add("keys and values", "reduce-scatter", seq, whole, False)
        if self.stages > 1:
            totals["activations", "collective-permute", ("stage",), False] = 2 * each
        if state := self.host().get("optimizer state"):
            totals["optimizer state", HOST, (), False] = 2 * state
        if activations := self.host().get("activations"):
            totals["activations", HOST, (), True] = 2 * activations * self.micro
        return [Flow(what, kind, axes, sent, hidden) for (what, kind, axes, hidden), sent in totals.items()]
