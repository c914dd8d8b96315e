"""The house keeps its rules: rooms, imports, sizes, no probing of protocol members, docstrings that are sentences.

`python tests/test_house.py` prints the counts. Which imports may point where is the contract of `lint-imports`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(ROOT.glob("jaxlm/**/*.py"))}
TREES = {path: ast.parse(text) for path, text in FILES.items()}
ROOMS = [
    "core", "data", "runtime", "nn", "training", "models", "weights", "objectives", "inference", "evaluation",
    "formats", "assembly", "planning", "commands",
]  # fmt: skip

# `hasattr`, and `getattr` with a default, ask objects of other packages alone; each line says which.
PROBES = {
    "jaxlm/core/config_io.py": "a user's config file, and fields of dataclasses whose types are being described",
    "jaxlm/core/typed_arguments.py": "tyro's marks of an option, of which only some name a value",
    "jaxlm/data/labelled/tables.py": "values of NumPy and features of TFDS",
    "jaxlm/data/loader.py": "JAX's shardings, of which only some have a spec",
    "jaxlm/formats/checkpoint_tree.py": "leaves of Orbax's trees",
    "jaxlm/planning/ahead_of_time.py": "leaves of JAX's trees",
    "jaxlm/planning/count_flops.py": "jaxprs, closed or open",
    "jaxlm/planning/targets.py": "JAX's devices",
    "jaxlm/runtime/compiler_options.py": "JAX's devices",
    "jaxlm/runtime/device_order.py": "JAX's devices",
    "jaxlm/runtime/rollcall_server.py": "what this system's sockets can be told",
    "jaxlm/training/log.py": "scalars of NumPy and JAX",
    "jaxlm/training/loop.py": "any iterator, of which only generators close",
}

# The first sentence of a docstring begins with none of these, and holds one of the verbs below. The list is made by
# hand: a docstring with a verb that isn't in it adds the verb.
PREPOSITIONS = """
    About After Among As At Before Beside Between By During For From In Into Of On Over Per That Those To Under Upon
    What Where Whether Which Whose With Within Without
""".split()  # noqa: SIM905
VERBS = """
    accepts adds allows answer answers applies are aren't ask asks assigns be become becomes begin begins binds
    bounds builds call calls can change changes checks choose chooses closes collects come comes compare compares
    compiles computes concatenates contracts converts copies could count counts cuts decodes depend depends
    describes dispatches divides do does doesn't don't draws embed encodes end ends estimates evaluates exports find
    finds fine-tune fit fits forgets gives go goes groups had has have hold holds implements imports initializes
    interleaves is isn't joins keep keeps lays learns lets loads logs looks make makes maps may mean means measures
    merge merges move moves multiplies multiply must name names need needs opens packs parses predict predicts
    prints provides put puts raises read reads rebuilds records refuses renders replaces rest rests restores returns
    rotate rotates rounds runs samples saves say says scale scales scores see sees sends sets share shares show
    shows splits stand stands start starts states store stored stores sums take takes teaches tell tells tokenises
    tokenizes train trains translates travel turns updates use uses waits was were wraps write writes yields
""".split()  # noqa: SIM905


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports(path: str) -> Iterator[str]:
    """Yields the modules of the package that a file imports, inside functions too."""
    names = {module_name(p) for p in FILES}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            inner = [f"{node.module}.{a.name}" for a in node.names]
            yield from (name for name in inner if name in names)
            if not all(name in names for name in inner):
                yield str(node.module)


GRAPH = {module_name(path): set(imports(path)) - {module_name(path)} for path in FILES}


def cycles() -> list[list[str]]:
    """Returns groups of modules that import each other in a circle (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in GRAPH[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(group)

    for name in GRAPH:
        if name not in order:
            visit(name)
    return groups


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.lineno} {node.name}", node


def probes() -> list[str]:
    """Returns where `hasattr`, or `getattr` with a default, is called."""
    return [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3))
    ]  # fmt: skip


def docstrings() -> Iterator[tuple[str, str]]:
    """Yields (where it stands, the first sentence) of public docstrings."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = path if isinstance(node, ast.Module) else node.name
            if (text := ast.get_docstring(node)) and not name.startswith("_"):
                where = f"{path}:{getattr(node, 'lineno', 1)} {name}"
                yield where, re.split(r"(?<=[.!?])(?<!et al\.)\s", " ".join(text.split("\n\n")[0].split()))[0]


def fragments() -> list[str]:
    """Returns public docstrings whose first sentence begins like a fragment or an error's name, or has no verb."""
    return [
        f"{where}: {sentence}"
        for where, sentence in docstrings()
        if re.split(r"\W", sentence)[0] in PREPOSITIONS or re.match(r"\w+Error:", sentence) or not has_verb(sentence)
    ]


def has_verb(sentence: str) -> bool:
    return any(word in VERBS for word in re.findall(r"[a-z'-]+", sentence.lower()))


def test_there_are_fourteen_rooms():
    rooms = {path.split("/")[1] for path in FILES if path.count("/") > 1}
    assert rooms == set(ROOMS) and len(ROOMS) == 14
    assert {path for path in FILES if path.count("/") == 1} == {
        f"jaxlm/{name}.py" for name in ("__init__", "__main__", "api", "testing")
    }


def test_no_modules_import_each_other_in_a_circle():
    assert cycles() == []


def test_no_file_and_no_function_is_too_long():
    assert [f"{path}: {text.count(chr(10))} lines" for path, text in FILES.items() if text.count("\n") > 600] == []
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert {name: n for name, n in lengths.items() if n > 80} == {}


def test_nothing_probes_for_members():
    assert [place for place in probes() if place.split(":")[0] not in PROBES] == []


def test_docstrings_are_sentences():
    assert fragments() == []


def room_of(module: str) -> str:
    return module.split(".")[1] if module.split(".")[1:2] and module.split(".")[1] in ROOMS else "root"


if __name__ == "__main__":
    arrows = {(room_of(a), room_of(b)) for a, others in GRAPH.items() for b in others}
    arrows = {(a, b) for a, b in arrows if a != b}
    print(f"{len(FILES)} files, {sum(text.count(chr(10)) for text in FILES.values()):,} lines")
    print(f"{len(ROOMS)} rooms, {sum(map(len, GRAPH.values()))} imports, {len(arrows)} arrows between rooms")
    print(f"{len(cycles())} import cycles, {len(probes())} probes, {len(fragments())} fragments")
    print(*fragments(), sep="\n")
