"""Parses HLO text: shapes, instructions, groups of devices, lines of source. It needs no jax."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "f32": 32,
        "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64, "c128": 128}  # fmt: skip
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")


def arrays(shape: str, everywhere: bool = True) -> Iterator[int]:
    """Yields the bytes of each array of a shape; without `everywhere` those that lie in the main memory alone.

    A TPU's layout ends in S(1) where the array lies in the memory beside the core.
    """
    for kind, sizes, layout in ARRAY.findall(shape):
        if everywhere or "S(" not in layout:
            bits = BITS.get(kind, 8 if kind.startswith("f8") else 0)
            yield math.prod(int(n) for n in sizes.split(",") if n) * bits // 8


def size(shape: str, everywhere: bool = True) -> int:
    """Returns the bytes of a shape's arrays together."""
    return sum(arrays(shape, everywhere))


def of_the_host(shape: str) -> str:
    """Returns a shape of which the arrays in the host's memory, S(5), alone keep their size, as if they lay in the main
    memory."""
    return ARRAY.sub(lambda m: m[0].replace(":S(5)", "") if "S(5)" in (m[3] or "") else f"{m[1]}[0]{{0}}", shape)


@dataclass(frozen=True)
class Instruction:
    """An Instruction is one line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str
    """The text between the brackets, which for a constant is its value."""
    root: bool
    """Whether it gives the computation's result."""

    def attribute(self, name: str) -> str | None:
        """Returns the name that an attribute refers to, or None without it."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


def result_of_start(shape: str) -> str:
    """Returns the second part of a shape `((operands), result, context)`: what a kernel that was started will give."""
    depth, cuts = 0, [0]
    for m in re.finditer(r"[(\[{}\]),]", shape):
        depth += {"(": 1, "[": 1, "{": 1, ",": 0}.get(m[0], -1)
        if m[0] == "," and depth == 1:
            cuts.append(m.end())
    return shape[cuts[1] : cuts[2] - 1].strip()


class Frames:
    """A Frames leads from an instruction's metadata to the line of source that it comes from."""

    def __init__(self, text: str):
        tables = {}
        for title in ("FileNames", "FileLocations", "StackFrames"):
            part = re.search(rf"^{title}\n((?:\d.*\n)+)", text, re.M)
            lines = part[1].splitlines() if part else []
            tables[title] = {int(x.split(" ", 1)[0]): x.split(" ", 1)[1] for x in lines}
        self.files = {k: v.strip('"') for k, v in tables["FileNames"].items()}
        number = lambda text, name: int((re.search(rf"{name}=(\d+)", text) or [0, 0])[1])  # noqa: E731
        self.locations = {
            k: (number(v, "file_name_id"), number(v, r"\bline")) for k, v in tables["FileLocations"].items()
        }
        self.stack = {
            k: (number(v, "file_location_id"), number(v, "parent_frame_id")) for k, v in tables["StackFrames"].items()
        }

    def where(self, i: Instruction) -> str:
        """Returns the innermost line of a model, a loss or the like, as `models/llama.py:129 path/of/the/operation`."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', i.attributes)
        operation = "/".join(p for p in (match[1] if match else "").split("/")[1:] if p)[-60:]
        frame = re.search(r"stack_frame_id=(\d+)", i.attributes)
        number, depth = int(frame[1]) if frame else 0, 0
        while number in self.stack and depth < 64:
            location, parent = self.stack[number]
            file, line = self.locations.get(location, (0, 0))
            path = self.files.get(file, "")
            if "/jaxlm/" in path and not path.endswith(("/layout.py", "/mesh.py", "/step.py", "/program.py")):
                return f"{path.rpartition('/jaxlm/')[2]}:{line} {operation}".strip()
            number, depth = (parent if parent != number else 0), depth + 1
        if plain := re.search(r'source_file="[^"]*?/jaxlm/([^"]*)" source_line=(\d+)', i.attributes):
            return f"{plain[1]}:{plain[2]} {operation}".strip()
        return operation or i.name


def instruction(line: str) -> Instruction | None:
    """Parses ` ROOT %name = shape opcode(operands), attributes`; returns None for another line."""
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    end = closing_bracket(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = closing_bracket(rest, start)
    inner = rest[start + 1 : stop]
    return Instruction(match[2], shape, rest[:start], tuple(re.findall(r"%([\w.\-]+)", inner)), rest[stop + 1 :],
                       inner, bool(match[1]))  # fmt: skip


def closing_bracket(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at `start`."""
    depth = 0
    for m in re.finditer(r"[()]", text[start:]):
        depth += 1 if m[0] == "(" else -1
        if not depth:
            return start + m.start()
    return len(text)


def unravel(index: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the coordinates of an index in an array of these sizes."""
    coordinates = []
    for n in reversed(sizes):
        index, rest = divmod(index, n)
        coordinates.append(rest)
    return tuple(reversed(coordinates))


def first_group(attributes: str) -> tuple[int, ...]:
    """Returns the devices of the first group of a collective, in each of the ways that HLO writes groups."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return _cycle([tuple(map(int, p.split(","))) for p in re.findall(r"\{(\d+,\d+)\}", pairs[1])])
    if plain := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(int(n) for n in plain[1].split(",") if n)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        count, sizes = int(iota[2]), tuple(int(n) for n in iota[3].split(","))
        order = tuple(int(n) for n in iota[4].split(",")) if iota[4] else tuple(range(len(sizes)))
        turned = tuple(sizes[k] for k in order)
        strides = [math.prod(sizes[k + 1 :]) for k in order]
        coordinates = (unravel(n, turned) for n in range(count))
        return tuple(sum(p * s for p, s in zip(place, strides, strict=True)) for place in coordinates)
    if named := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        return _named_group(named[1], named[2])
    return ()


def _named_group(mesh: str, over: str) -> tuple[int, ...]:
    """Returns the devices of a group over named axes: `'a'=2,'b'=4` and `'b'`, or a part of an axis, `'b':(2)2`:
    before:(size before)size."""
    sizes: dict[str, int] = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    strides = {name: math.prod(list(sizes.values())[k + 1 :]) for k, name in enumerate(sizes)}
    steps = []
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        n = int(part) if part else sizes[name]
        inner = sizes[name] // (int(before) * n) if part else 1
        steps.append([k * inner * strides[name] for k in range(n)])
    return tuple(sum(s) for s in itertools.product(*steps))


def _cycle(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the devices that a permutation's first pair is connected with."""
    after: dict[int, int] = {a: b for a, b in pairs}  # noqa: C416  (a tuple of two, to mypy of any)
    members = [pairs[0][0]] if pairs else []
    while members and (n := after.get(members[-1])) is not None and n not in members:
        members.append(n)
    return tuple(members)
