"""What a compiled program does, read from its HLO text: loops, collectives, memory traffic, large arrays. No jax.

Counts are of one device and one call; what stands in a loop counts as often as the loop runs.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32,
        "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64, "c128": 128}  # fmt: skip
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")  # fmt: skip
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota",
        "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency"}  # fmt: skip


def arrays(shape: str, everywhere: bool = True) -> Iterator[int]:
    """Bytes of each array of a shape; without `everywhere` those that lie in the main memory alone.

    A TPU's layout ends in S(1) where the array lies in the memory beside the core.
    """
    for kind, sizes, layout in ARRAY.findall(shape):
        if everywhere or "S(" not in layout:
            bits = BITS.get(kind, 8 if kind.startswith("f8") else 0)
            yield math.prod(int(n) for n in sizes.split(",") if n) * bits // 8


def size(shape: str, everywhere: bool = True) -> int:
    return sum(arrays(shape, everywhere))


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str
    """What stands between the brackets: of a constant its value."""
    root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


@dataclass(frozen=True)
class Collective:
    kind: str
    axes: tuple[str, ...]
    """Mesh axes that it goes over."""
    ways: int
    """Devices of a group."""
    bytes: int
    """Of the whole array: gathered, before it is scattered, reduced."""
    times: int
    where: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all, by rings."""
        rounds = {"all-reduce": 2, "collective-permute": self.ways / max(1, self.ways - 1)}.get(self.kind, 1)
        return self.times * self.bytes * rounds * (self.ways - 1) / self.ways


@dataclass(frozen=True)
class Buffer:
    bytes: int
    shape: str
    opcode: str
    where: str


class Module:
    """A compiled program. `mesh`: names and sizes of the mesh axes, outer to inner, in the order of its devices."""

    def __init__(self, text: str, mesh: Mapping[str, int] | None = None):
        self.mesh = dict(mesh or {})
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
        """How often each computation runs that isn't part of a fused kernel: the entry, loops' bodies, calls."""
        out: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            out[name] = out.get(name, 0) + times
            for i in self.computations.get(name, {}).values():
                if i.opcode == "while":
                    body = i.attribute("body")
                    assert body
                    visit(body, times * self.trips(i))
                elif i.opcode in ("call", "async-start"):
                    visit(i.attribute("to_apply") or i.attribute("calls") or "", times)
                elif i.opcode == "conditional":
                    for branch in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.attributes):
                        visit(branch, times)
                    if several := re.search(r"branch_computations=\{([^}]*)\}", i.attributes):
                        for branch in re.findall(r"%?([\w.\-]+)", several[1]):
                            visit(branch, times)

        visit(self.entry, 1)
        return out

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: what the compiler notes, else the constant its counter is compared with."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition") or "", {})
        inside = list(self._with_fused(condition))
        limits = [int(c.literal) for c in inside if c.opcode == "constant" and c.literal.isdigit()]
        if limits and any(i.opcode == "compare" and "direction=LT" in i.attributes for i in inside):
            return -(-max(limits) // self._stride(condition, self.computations.get(loop.attribute("body") or "", {})))
        return 1

    @staticmethod
    def _stride(condition: Mapping[str, Instruction], body: Mapping[str, Instruction]) -> int:
        """What a round adds to the counter: more than 1 where the compiler unrolled the loop in part."""
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
        out = []
        for name, times in self.runs.items():
            for i in self.computations.get(name, {}).values():
                kernel = self.computations.get(i.attribute("calls") or "", {}) if i.opcode == "fusion" else {}
                for j in (i, *kernel.values()):
                    kind = j.opcode.removesuffix("-start")
                    if kind in COLLECTIVES and not j.opcode.endswith("-done"):
                        out.append(self._collective(kind, j, i, times, kernel or self.computations[name]))
        return [c for c in out if c.ways > 1]

    def _collective(
        self, kind: str, j: Instruction, shown: Instruction, times: int, beside: Mapping[str, Instruction]
    ) -> Collective:
        # A TPU writes a reduction of which every device keeps a part as one kernel: all-reduce, then its own slice.
        ops = {k.opcode for k in beside.values()} if shown.opcode == "fusion" else set()
        if kind == "all-reduce" and {"partition-id", "dynamic-slice"} <= ops:
            kind = "reduce-scatter"
        ways, axes = self.group(j.attributes)
        found = list(arrays(j.shape))
        if j.opcode.endswith("-start") and j.shape.startswith("(") and kind != "all-reduce":
            found = found[: -2 if kind == "collective-permute" and len(found) > 2 else None]  # without its two contexts
            first, last = sum(found[: len(found) // 2]), sum(found[len(found) // 2 :])
        else:
            first = last = sum(found)
            if kind == "reduce-scatter" and "all-reduce" not in j.opcode:
                first = last * ways
        whole = max(first, last)
        if kind == "ragged-all-to-all":  # one side has room for the worst case; no more than the other's rows travel
            whole = min(size(beside[j.operands[0]].shape), found[-1])
        return Collective(kind, axes, ways, whole, times, self.frames.where(shown if shown.attributes else j))

    def group(self, attributes: str) -> tuple[int, tuple[str, ...]]:
        """(devices of a group, mesh axes that its devices differ in)."""
        members = first_group(attributes)
        if not self.mesh or math.prod(self.mesh.values()) <= max(members, default=0):
            return len(members), ()
        places = [unravel(m, tuple(self.mesh.values())) for m in members]
        axes = tuple(a for k, a in enumerate(self.mesh) if len({p[k] for p in places}) > 1)
        return len(members), axes

    @cached_property
    def traffic(self) -> int:
        """Bytes to and from main memory, if every kernel reads its operands and writes its results once.

        Of arrays that a kernel only cuts a slice from, or writes one into, the slice counts.
        """
        total = 0
        for name, times in self.runs.items():
            inside = self.computations.get(name, {})
            for i in inside.values():
                if i.opcode not in FREE and not i.opcode.endswith("-done"):
                    total += times * self._moved(i, inside)
        return total

    def _moved(self, i: Instruction, inside: Mapping[str, Instruction]) -> int:
        shapes = [inside[o].shape if o in inside else "" for o in i.operands]
        if i.opcode.endswith("-start") and i.opcode.removesuffix("-start") in COLLECTIVES:
            return size(i.shape, False)
        if i.opcode in ("copy-start", "slice-start", "async-start"):
            moved = next(iter(arrays(i.shape)), 0)  # the result stands first
            ends = [*ARRAY.finditer(i.shape)][:1] + [*ARRAY.finditer(" ".join(shapes))][:1]
            return moved * sum("S(" not in (e[3] or "") for e in ends)
        if i.opcode == "dynamic-slice":
            return 2 * size(i.shape, False)
        if i.opcode == "dynamic-update-slice":
            return 2 * size(shapes[1], False)
        if i.opcode != "fusion":
            return size(i.shape, False) + sum(size(s, False) for s in shapes)
        kernel = self.computations.get(i.attribute("calls") or "", {})
        read = sum(self._read(kernel, n, shape) for n, shape in enumerate(shapes))
        return read + self._written(kernel, i.shape)

    def _read(self, kernel: Mapping[str, Instruction], n: int, shape: str) -> int:
        """Of a kernel's operand `n`. Kernels stand in kernels."""
        whole = size(shape, False)
        mine = next((k.name for k in kernel.values() if k.opcode == "parameter" and k.literal == str(n)), None)
        names = {mine} | {k.name for k in kernel.values() if k.opcode == "bitcast" and mine in k.operands}
        users = [k for k in kernel.values() if names & {*k.operands} and k.name not in names]
        cut = 0
        for u in users:
            first = u.operands[0] in names  # what is cut from or into, not where
            if u.opcode == "fusion":
                inner = self.computations.get(u.attribute("calls") or "", {})
                cut += sum(self._read(inner, k, shape) for k, o in enumerate(u.operands) if o in names)
            elif first and u.opcode == "dynamic-slice":
                cut += size(u.shape)
            elif not first or u.opcode != "dynamic-update-slice":
                return whole
        return min(cut, whole) if users else whole

    def _written(self, kernel: Mapping[str, Instruction], shape: str) -> int:
        root = next((k for k in kernel.values() if k.root), None)
        if root is None or root.opcode != "tuple":
            return self._put(kernel, root, shape)
        parts = [part[0] for part in ARRAY.finditer(shape)]
        if len(parts) != len(root.operands):
            return size(shape, False)
        return sum(self._put(kernel, kernel.get(o), part) for o, part in zip(root.operands, parts, strict=True))

    def _put(self, kernel: Mapping[str, Instruction], one: Instruction | None, shape: str) -> int:
        """Bytes that one of a kernel's results puts into an array of this shape."""
        while one is not None and one.opcode in ("bitcast", "copy", "convert") and one.operands[0] in kernel:
            one = kernel[one.operands[0]]
        if one is not None and one.opcode == "fusion" and not one.shape.startswith("("):
            return self._written(self.computations.get(one.attribute("calls") or "", {}), shape)
        if one is not None and one.opcode == "dynamic-update-slice" and one.operands[1] in kernel:
            return size(kernel[one.operands[1]].shape) if size(shape, False) else 0
        return size(shape, False)

    @cached_property
    def estimated_cycles(self) -> int:
        """The TPU compiler's own estimate of all kernels, without waiting for networks; 0 of other compilers."""
        total = 0
        for name, times in self.runs.items():
            for i in self.computations.get(name, {}).values():
                if found := re.search(r'estimated_cycles":"(\d+)"', i.attributes):
                    total += times * int(found[1])
        return total

    def buffers(self, n: int = 8) -> list[Buffer]:
        """The largest arrays that the program makes, one of each source line and shape."""
        found: dict[tuple[str, str], Buffer] = {}
        for name in self.runs:
            for i in self.computations.get(name, {}).values():
                if i.opcode in FREE or i.opcode.endswith("-done") or i.opcode in ("copy-start", "slice-start"):
                    continue
                for kind, sizes, layout in ARRAY.findall(i.shape):
                    shape = f"{kind}[{sizes}]"
                    if "S(" not in layout:
                        one = Buffer(size(shape), shape, i.opcode, self.frames.where(i))
                        found.setdefault((one.where, shape), one)
        return sorted(found.values(), key=lambda b: -b.bytes)[:n]


class Frames:
    """From an instruction's metadata to the line of source that it comes from."""

    def __init__(self, text: str):
        tables = {}
        for title in ("FileNames", "FileLocations", "StackFrames"):
            part = re.search(rf"^{title}\n((?:\d.*\n)+)", text, re.M)
            lines = part[1].splitlines() if part else []
            tables[title] = {int(x.split(" ", 1)[0]): x.split(" ", 1)[1] for x in lines}
        self.files = {k: v.strip('"') for k, v in tables["FileNames"].items()}
        number = lambda text, name: int((re.search(rf"{name}=(\d+)", text) or [0, 0])[1])  # noqa: E731
        self.places = {k: (number(v, "file_name_id"), number(v, r"\bline")) for k, v in tables["FileLocations"].items()}
        self.stack = {
            k: (number(v, "file_location_id"), number(v, "parent_frame_id")) for k, v in tables["StackFrames"].items()
        }

    def where(self, i: Instruction) -> str:
        """`models/llama.py:129 path/of/the/operation`: the innermost line of a model, a loss or the like."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', i.attributes)
        operation = "/".join(p for p in (found[1] if found else "").split("/")[1:] if p)[-60:]
        frame = re.search(r"stack_frame_id=(\d+)", i.attributes)
        at, seen = int(frame[1]) if frame else 0, 0
        while at in self.stack and seen < 64:
            location, parent = self.stack[at]
            file, line = self.places.get(location, (0, 0))
            path = self.files.get(file, "")
            if "/jaxlm/" in path and not path.endswith(("/layout.py", "/mesh.py", "/step.py", "/program.py")):
                return f"{path.rpartition('/jaxlm/')[2]}:{line} {operation}".strip()
            at, seen = (parent if parent != at else 0), seen + 1
        if plain := re.search(r'source_file="[^"]*?/jaxlm/([^"]*)" source_line=(\d+)', i.attributes):
            return f"{plain[1]}:{plain[2]} {operation}".strip()
        return operation or i.name


def instruction(line: str) -> Instruction | None:
    """`  ROOT %name = shape opcode(operands), attributes`, or None."""
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = closing(rest, start)
    inner = rest[start + 1 : stop]
    return Instruction(found[2], shape, rest[:start], tuple(re.findall(r"%([\w.\-]+)", inner)), rest[stop + 1 :],
                       inner, bool(found[1]))  # fmt: skip


def closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at `start`."""
    depth = 0
    for m in re.finditer(r"[()]", text[start:]):
        depth += 1 if m[0] == "(" else -1
        if not depth:
            return start + m.start()
    return len(text)


def unravel(index: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    out = []
    for n in reversed(sizes):
        index, rest = divmod(index, n)
        out.append(rest)
    return tuple(reversed(out))


def first_group(attributes: str) -> tuple[int, ...]:
    """Devices of the first group of a collective, in each of the ways that HLO writes groups."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return _cycle([tuple(map(int, p.split(","))) for p in re.findall(r"\{(\d+,\d+)\}", pairs[1])])
    if plain := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(int(n) for n in plain[1].split(",") if n)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        count, sizes = int(iota[2]), tuple(int(n) for n in iota[3].split(","))
        order = tuple(int(n) for n in iota[4].split(",")) if iota[4] else tuple(range(len(sizes)))
        turned = tuple(sizes[k] for k in order)
        strides = [math.prod(sizes[k + 1 :]) for k in order]
        places = (unravel(n, turned) for n in range(count))
        return tuple(sum(p * s for p, s in zip(place, strides, strict=True)) for place in places)
    if named := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        return _named(named[1], named[2])
    return ()


def _named(mesh: str, over: str) -> tuple[int, ...]:
    """`'a'=2,'b'=4` and `'b'`, or of an axis a part, `'b':(2)2`: before:(size before)size."""
    sizes: dict[str, int] = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    strides = {name: math.prod(list(sizes.values())[k + 1 :]) for k, name in enumerate(sizes)}
    steps = []
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        n = int(part) if part else sizes[name]
        inner = sizes[name] // (int(before) * n) if part else 1
        steps.append([k * inner * strides[name] for k in range(n)])
    return tuple(sum(s) for s in itertools.product(*steps))


def _cycle(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Devices that a permutation's first pair is connected with."""
    after: dict[int, int] = {a: b for a, b in pairs}  # noqa: C416  (a tuple of two, to mypy of any)
    found = [pairs[0][0]] if pairs else []
    while found and (n := after.get(found[-1])) is not None and n not in found:
        found.append(n)
    return tuple(found)
