"""Reads from its HLO text what a compiled program does: loops, collectives, memory traffic, large arrays.

Counts are of one device and one call; what stands in a loop counts as often as the loop runs. It needs no jax.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from jaxlm.planning.hlo_text import (
    ARRAY,
    Frames,
    Instruction,
    arrays,
    first_group,
    instruction,
    of_the_host,
    result_of_start,
    size,
    unravel,
)

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota",
        "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency"}  # fmt: skip

CUTS = {"dynamic-slice", "gather"}
PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # with the operand that is put into the first one
STARTED = "fusion-start"
"""A fused kernel of a GPU that others run beside; what it gives is a `fusion-done`."""
WRAPPED = "async-start", "call-start"
"""Begin a computation that others run beside; a TPU's sparse cores get theirs by a call."""
UNKNOWN_CYCLES = (1 << 63) - 1
RARE = "further_documents"
"""Names loops that mostly don't run at all: the calls beyond the first of `nn/kernels/packed_attention.py: FURTHER`."""
BUFFER = "AllocateBuffer"
"""Names a call that gives room and runs nothing."""
BETWEEN_SLICES = "_xla_megascale_"
"""Begins the attributes of what a TPU's compiler sends to other slices, by way of their hosts."""


@dataclass(frozen=True)
class Collective:
    """A Collective is an exchange of arrays between devices."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes that it goes over."""
    ways: int
    """Devices of a group."""
    bytes: int
    """Bytes of the whole array: once it is gathered, before it is scattered, or as it is reduced."""
    times: int
    """How often it runs in a call of the program."""
    where: str
    """The line of source that it comes from."""
    under: int = 0
    """Kernels that are put between its beginning and its end; 0: all others wait for it."""

    @property
    def sent(self) -> float:
        """Returns the bytes that one device sends in all, by rings."""
        rounds = {"all-reduce": 2, "collective-permute": self.ways / max(1, self.ways - 1)}.get(self.kind, 1)
        return self.times * self.bytes * rounds * (self.ways - 1) / self.ways


@dataclass(frozen=True)
class Buffer:
    """A Buffer is an array that the program makes, and where."""

    bytes: int
    shape: str
    opcode: str
    where: str


class Module:
    """A Module is a compiled program.

    `mesh` gives names and sizes of the mesh axes, outer to inner, in the order of its devices, and `crossing` how many
    ways of each lie in different slices of TPUs.
    """

    def __init__(
        self, text: str, mesh: Mapping[str, int] | None = None, crossing: Mapping[str, int] | None = None
    ) -> None:
        self.mesh, self.crossing = dict(mesh or {}), dict(crossing or {})
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.frames = Frames(text)
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" ") and "->" in line:
                name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
                assert name
                current = self.computations.setdefault(name[1], {})
                self.entry = name[1] if line.startswith("ENTRY") else self.entry
            elif line == "}":  # a kernel's own text may run over lines
                current = None
            elif current is not None and (one := instruction(line)):
                current[one.name] = one

    @cached_property
    def runs(self) -> dict[str, int]:
        """Returns how often each computation runs that isn't part of a fused kernel: the entry, loops' bodies,
        calls."""
        counts: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for i in self.computations.get(name, {}).values():
                if i.opcode == "while":
                    body = i.attribute("body")
                    assert body
                    visit(body, times * self.trips(i))
                elif i.opcode in ("call", *WRAPPED):
                    visit(i.attribute("to_apply") or i.attribute("calls") or "", times)
                elif i.opcode == "conditional":
                    for branch in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.attributes):
                        visit(branch, times)
                    if listed := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
                        for branch in re.findall(r"%?([\w.\-]+)", listed[1]):
                            visit(branch, times)

        visit(self.entry, 1)
        return counts

    def trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs: what the compiler notes, else the constant that its counter is compared
        with. Those that mostly don't run at all are left out."""
        if RARE in loop.attributes:
            return 0
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition") or "", {})
        instructions = list(self._with_fused(condition))
        limits = [int(c.literal) for c in instructions if c.opcode == "constant" and c.literal.isdigit()]
        if limits and any(i.opcode == "compare" and "direction=LT" in i.attributes for i in instructions):
            return -(-max(limits) // self._stride(condition, self.computations.get(loop.attribute("body") or "", {})))
        return 1

    @staticmethod
    def _stride(condition: Mapping[str, Instruction], body: Mapping[str, Instruction]) -> int:
        """Returns what a round adds to the counter: more than 1 where the compiler unrolled the loop in part."""
        root = next((i for i in body.values() if i.root and i.opcode == "tuple"), None)
        counted = [i.attribute("index") for i in condition.values() if i.opcode == "get-tuple-element"]
        if root is None or len(counted) != 1 or counted[0] is None:
            return 1
        last = body.get(root.operands[int(counted[0])])
        if last is None or last.opcode != "add":
            return 1
        added = [int(body[o].literal) for o in last.operands if o in body and body[o].literal.isdigit()
                 and body[o].opcode == "constant"]  # fmt: skip
        return max(1, *added) if added else 1

    def _with_fused(self, computation: Mapping[str, Instruction]) -> Iterator[Instruction]:
        for i in computation.values():
            yield i
            if i.opcode == "fusion":
                yield from self._with_fused(self.computations.get(i.attribute("calls") or "", {}))

    @cached_property
    def collectives(self) -> list[Collective]:
        """Returns the collectives that go over more than one device."""
        collectives = []
        wrapped: dict[str, int] = {}  # kernels beside a computation that runs beside others
        for name, times in self.runs.items():
            under = self._under(self.computations.get(name, {}))
            for outer in self.computations.get(name, {}).values():
                if outer.opcode in WRAPPED:
                    wrapped[outer.attribute("to_apply") or outer.attribute("calls") or ""] = under.get(outer.name, 0)
                kernel = self.computations.get(outer.attribute("calls") or "", {}) if outer.opcode == "fusion" else {}
                for inner in (outer, *kernel.values()):
                    kind = inner.opcode.removesuffix("-start")
                    if kind in COLLECTIVES and not inner.opcode.endswith("-done"):
                        one = self._collective(kind, inner, outer, times, kernel or self.computations[name])
                        collectives.append(replace(one, under=under.get(inner.name, wrapped.get(name, 0))))
                    elif inner.opcode == "send" and BETWEEN_SLICES in inner.attributes:
                        collectives.append(self._between_slices(inner, times))
        return [c for c in collectives if c.ways > 1]

    @staticmethod
    def _under(computation: Mapping[str, Instruction]) -> dict[str, int]:
        """Returns how many kernels are put between what begins something, by its name, and what ends it. A loop counts
        as one kernel, and other exchanges and copies as none."""
        count, begun, under = 0, dict[str, tuple[str, int]](), dict[str, int]()
        for i in computation.values():
            if i.opcode.endswith("-start"):
                begun[i.name] = i.name, count
            elif i.opcode.endswith("-update"):
                if came := next((o for o in i.operands if o in begun), None):
                    begun[i.name] = begun[came]
            elif i.opcode.endswith("-done"):
                under |= {begun[o][0]: count - begun[o][1] for o in i.operands if o in begun}
            elif i.opcode not in COLLECTIVES and (i.opcode not in FREE or i.opcode in ("while", "conditional", "call")):
                count += 1
        return under

    def _between_slices(self, i: Instruction, times: int) -> Collective:
        """Returns what one `send` to the hosts of TPUs belongs to: they bring slices together, over their network."""
        attribute = lambda name: (re.search(rf'{BETWEEN_SLICES}{name}="([^"]*)"', i.attributes) or ["", ""])[1]  # noqa: E731
        kind = attribute("transfer_type").lower().replace("_", "-")
        listed = re.match(r"\{([\d,:]*)\}", attribute("target"))
        slices = [n - 1 for part in (listed[1] if listed else "").split(",") if part for n in _range(part)]
        whole = next(arrays(i.shape), 0) * (len(slices) if kind == "all-gather" else 1)
        kind = "collective-permute" if kind == "one-to-one" else kind
        places = [unravel(n, tuple(self.crossing.values())) for n in slices]
        axes = tuple(a for k, a in enumerate(self.crossing) if len({p[k] for p in places}) > 1)
        return Collective(kind, axes, len(slices), whole, times, self.frames.where(i))

    def _collective(
        self, kind: str, inner: Instruction, outer: Instruction, times: int, computation: Mapping[str, Instruction]
    ) -> Collective:
        # A TPU writes a reduce-scatter as one kernel: all-reduce, then each device's own slice.
        ops = {k.opcode for k in computation.values()} if outer.opcode == "fusion" else set()
        if kind == "all-reduce" and {"partition-id", "dynamic-slice"} <= ops:
            kind = "reduce-scatter"
        ways, axes = self.group(inner.attributes)
        sizes = list(arrays(inner.shape))
        if inner.opcode.endswith("-start") and inner.shape.startswith("(") and kind != "all-reduce":
            if kind == "collective-permute" and len(sizes) > 2:
                sizes = sizes[:-2]  # the last two are contexts
            first, last = sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :])
        else:
            twice = kind == "all-reduce" and inner.shape.startswith("((")  # newer compilers name operands and results
            first = last = sum(sizes) // (2 if twice else 1)
            if kind == "reduce-scatter" and "all-reduce" not in inner.opcode:
                first = last * ways
        whole = max(first, last)
        if kind == "ragged-all-to-all":  # one side has room for the worst case, and only the other's rows travel
            whole = min(size(computation[inner.operands[0]].shape), sizes[-1])
        return Collective(kind, axes, ways, whole, times, self.frames.where(outer if outer.attributes else inner))

    def group(self, attributes: str) -> tuple[int, tuple[str, ...]]:
        """Returns how many devices a group has, and the mesh axes that its devices differ in."""
        members = first_group(attributes)
        if not self.mesh or math.prod(self.mesh.values()) <= max(members, default=0):
            return len(members), ()
        coordinates = [unravel(m, tuple(self.mesh.values())) for m in members]
        axes = tuple(a for k, a in enumerate(self.mesh) if len({p[k] for p in coordinates}) > 1)
        return len(members), axes

    @cached_property
    def traffic(self) -> int:
        """Returns the bytes to and from main memory, if every kernel reads its operands and writes its results once.

        Where a kernel only cuts slices from an array, or writes some into it, the slices count.
        """
        total = 0
        for name, times in self.runs.items():
            computation = self.computations.get(name, {})
            for i in computation.values():
                if i.opcode not in FREE and not i.opcode.endswith("-done"):
                    total += times * self._moved(i, computation)
        return total

    @cached_property
    def kernels(self) -> int:
        """Returns how many kernels a GPU runs in a call: fused ones, calls of libraries, copies and whatever else isn't
        free; collectives of networks too."""
        return sum(
            times * sum(i.opcode not in FREE and not i.opcode.endswith("-done") and BUFFER not in i.attributes
                        for i in self.computations.get(name, {}).values())
            for name, times in self.runs.items()
        )  # fmt: skip

    @cached_property
    def host_traffic(self) -> int:
        """Returns the bytes between the device and the host's memory: copies and kernels read and write what rests
        there."""
        total = 0
        for name, times in self.runs.items():
            computation = self.computations.get(name, {})
            for i in computation.values():
                shapes = [computation[o].shape if o in computation else "" for o in i.operands]
                if (
                    i.opcode in FREE | {"custom-call"}
                    or i.opcode.endswith("-done")
                    or "S(5)" not in "".join(shapes) + i.shape
                ):
                    continue
                if i.opcode in ("fusion", STARTED):
                    made = result_of_start(i.shape) if i.opcode == STARTED else i.shape
                    total += times * self._of_kernel(i, [of_the_host(s) for s in shapes], of_the_host(made))
                elif i.opcode == "copy-start":
                    total += times * next(arrays(i.shape), 0)
                else:
                    total += times * (size(of_the_host(i.shape)) + sum(size(of_the_host(s)) for s in shapes))
        return total

    def _moved(self, i: Instruction, computation: Mapping[str, Instruction]) -> int:
        shapes = [computation[o].shape if o in computation else "" for o in i.operands]
        if i.opcode.endswith("-start") and i.opcode.removesuffix("-start") in COLLECTIVES:
            return size(i.shape, False)
        if i.opcode in ("copy-start", "slice-start", "async-start"):
            moved = next(iter(arrays(i.shape)), 0)  # the result comes first
            ends = [*ARRAY.finditer(i.shape)][:1] + [*ARRAY.finditer(" ".join(shapes))][:1]
            return moved * sum("S(" not in (e[3] or "") for e in ends)
        if i.opcode in CUTS:
            return 2 * size(i.shape, False)
        if i.opcode in PUTS:
            return 2 * size(shapes[PUTS[i.opcode]], False)
        if i.opcode not in ("fusion", STARTED):
            return size(i.shape, False) + sum(size(s, False) for s in shapes)
        return self._of_kernel(i, shapes, result_of_start(i.shape) if i.opcode == STARTED else i.shape)

    def _of_kernel(self, i: Instruction, shapes: list[str], made: str) -> int:
        """Returns the bytes that a kernel reads of operands of these shapes, and writes of its result."""
        kernel = self.computations.get(i.attribute("calls") or "", {})
        return sum(self._read(kernel, n, shape) for n, shape in enumerate(shapes)) + self._written(kernel, made)

    def _read(self, kernel: Mapping[str, Instruction], n: int, shape: str) -> int:
        """Returns the bytes that a kernel reads of its operand `n`. Kernels may hold kernels."""
        full_size = size(shape, False)
        parameter = next((k.name for k in kernel.values() if k.opcode == "parameter" and k.literal == str(n)), None)
        names = {parameter} | {k.name for k in kernel.values() if k.opcode == "bitcast" and parameter in k.operands}
        users = [k for k in kernel.values() if names & {*k.operands} and k.name not in names]
        cut = 0
        for u in users:
            first = u.operands[0] in names  # it is the array that is cut from or into, not the index
            if u.opcode == "fusion":
                inner = self.computations.get(u.attribute("calls") or "", {})
                cut += sum(self._read(inner, k, shape) for k, o in enumerate(u.operands) if o in names)
            elif first and u.opcode in CUTS:
                cut += size(u.shape)
            elif not first or u.opcode not in PUTS:
                return full_size
        return min(cut, full_size) if users else full_size

    def _written(self, kernel: Mapping[str, Instruction], shape: str) -> int:
        root = next((k for k in kernel.values() if k.root), None)
        if root is None or root.opcode != "tuple":
            return self._put(kernel, root, shape)
        parts = [part[0] for part in ARRAY.finditer(shape)]
        if len(parts) != len(root.operands):
            return size(shape, False)
        return sum(self._put(kernel, kernel.get(o), part) for o, part in zip(root.operands, parts, strict=True))

    def _put(self, kernel: Mapping[str, Instruction], result: Instruction | None, shape: str) -> int:
        """Returns the bytes that one of a kernel's results puts into an array of this shape."""
        while result is not None and result.opcode in ("bitcast", "copy", "convert") and result.operands[0] in kernel:
            result = kernel[result.operands[0]]
        if result is not None and result.opcode == "fusion" and not result.shape.startswith("("):
            return self._written(self.computations.get(result.attribute("calls") or "", {}), shape)
        if result is not None and (n := PUTS.get(result.opcode)) and result.operands[n] in kernel:
            return size(kernel[result.operands[n]].shape) if size(shape, False) else 0
        return size(shape, False)

    @cached_property
    def estimated_cycles(self) -> int:
        """Returns the TPU compiler's own estimate of all kernels, without waiting for networks; 0 of other
        compilers. Some kernels it can't estimate, such as those of sparse cores."""
        total = 0
        for name, times in self.runs.items():
            for i in self.computations.get(name, {}).values():
                match = re.search(r'estimated_cycles":"(\d+)"', i.attributes)
                if match and int(match[1]) != UNKNOWN_CYCLES:
                    total += times * int(match[1])
        return total

    def buffers(self, n: int = 8) -> list[Buffer]:
        """Returns the largest arrays that the program makes, one of each source line and shape."""
        buffers: dict[tuple[str, str], Buffer] = {}
        for name in self.runs:
            for i in self.computations.get(name, {}).values():
                if i.opcode in FREE or i.opcode.endswith("-done") or i.opcode in ("copy-start", "slice-start"):
                    continue
                made = result_of_start(i.shape) if i.opcode == STARTED else i.shape
                for kind, sizes, layout in ARRAY.findall(made):
                    shape = f"{kind}[{sizes}]"
                    if "S(" not in layout:
                        buffer = Buffer(size(shape), shape, i.opcode, self.frames.where(i))
                        buffers.setdefault((buffer.where, shape), buffer)
        return sorted(buffers.values(), key=lambda b: -b.bytes)[:n]


def _range(text: str) -> range:
    """Returns the numbers of `3` or of `0:7`, which includes its last."""
    first, _, last = text.partition(":")
    return range(int(first), int(last or first) + 1)
