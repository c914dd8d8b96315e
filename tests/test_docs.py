"""What the documentation says is so: links lead somewhere, command lines and code would run, named fields exist.

The tutorials themselves are run, from top to bottom, by the slow test at the end.
"""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import pages

import jaxlm
from jaxlm.commands import cli
from jaxlm.core import config_io
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES
from jaxlm.weights.adapters import METHODS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", "launch/README.md"))]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PAGES}
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere() -> None:
    made = HOOKS.generated()
    broken = []
    for page, text in TEXT.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in HOOKS.LINK.findall(prose):
            path, _, anchor = target.partition("#")
            if ":" in path:
                continue
            there = (ROOT / page).parent / path if path else ROOT / page
            on_site = os.path.relpath(there, ROOT / "docs")
            if not there.exists() and on_site not in made:
                broken.append(f"{page}: {target}")
            elif anchor and anchor not in anchors(there.read_text("utf-8") if there.exists() else made[on_site]):
                broken.append(f"{page}: {target}: no such heading")
    assert not broken


def test_links_of_the_checkout_become_links_of_the_site() -> None:
    moved = HOOKS.moved_links("[a](../../examples/own_objective.py) [b](training.md#data) [c](https://x.y)",
                              "docs/how-to/library.md", "how-to/library.md")  # fmt: skip
    assert moved == "[a](../examples/own_objective.md) [b](training.md#data) [c](https://x.y)"
    assert HOOKS.moved_links("[a](docs/index.md)", "README.md", "project/x.md") == "[a](../index.md)"


def command_lines(text: str) -> Iterator[list[str]]:
    """Yields the arguments of each `jaxlm` command of a page's shell blocks and of its code between backquotes."""
    lines = [line for block in pages.blocks(text) if block.language == "bash"
             for line in block.text.replace("\\\n", " ").splitlines()]  # fmt: skip
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`(jaxlm [^`]+)`", prose)
    for line in lines:
        words = split(line)
        while "jaxlm" in words:
            words = words[words.index("jaxlm") + 1 :]
            end = next((i for i, word in enumerate(words) if set(word) <= set(";&|")), len(words))
            yield words[:end]
            words = words[end:]


def split(line: str) -> list[str]:
    """Returns the words of a shell line without its comment; separators of commands are words of their own."""
    return shlex.split(re.sub(r"([;&|]+) *", r" \1 ", line), comments=True)


OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w.-]*")
TAKE_A_RUN = (
    "train", "sweep", "coordinate", "work", "plan", "tune", "coordinate-check", "data prepare", "data inspect",
)  # fmt: skip


def check_command(words: list[str], page: str, helps: dict[str, str], folder: Path) -> None:
    """Checks the words after `jaxlm`: a command of the package, its options, and fields of the run that it names."""
    plugin = "--plugin" in words
    while "--plugin" in words:
        del words[words.index("--plugin") : words.index("--plugin") + 2]
    command = next((c for c in cli.COMMANDS if words[: len(c.split())] == c.split()), None)
    if command is None:
        assert not words or words[0].startswith("-"), f"no command {words[0]}"
        return
    rest, fields, place = words[len(command.split()) :], [], ""
    for i, word in enumerate(rest):
        name = word.partition("=")[0]
        if not name.startswith("--"):
            place = place or ("" if i else word)
        elif name not in OPTION.findall(helps[command]) and name != "--help":
            assert command in TAKE_A_RUN, f"jaxlm {command} has no option {name}"
            end = next((j for j in range(i + 1, len(rest)) if rest[j].startswith("--")), len(rest))
            fields += [word, *rest[i + 1 : end]]
    if command in TAKE_A_RUN and not plugin:
        written = {b.title: b.text for b in pages.blocks(TEXT[page]) if b.language == "python"}
        if place and place in written:
            (folder / place).write_text(written[place])
            place = str(folder / place)
        known = {path.stem for path in (ROOT / "configs").glob("*.py")}
        if not place.endswith(".py"):  # a run directory of a page, or CONFIG
            name = Path(place).name
            place = name if name in known else "tiny_llama"
        run, fields = config_io.choose_adapter(config_io.load(config_io.find(place)), fields, METHODS)
        config_io.override(run, fields)


def test_every_command_line_of_a_page_would_be_understood(tmp_path: Path) -> None:
    helps = {command: HOOKS.help_of(*command.split()) for command in cli.COMMANDS}
    wrong, checked = [], 0
    for page, text in TEXT.items():
        for words in command_lines(text):
            checked += 1
            try:
                check_command(list(words), page, helps, tmp_path)
            except (AssertionError, ValueError) as error:
                wrong.append(f"{page}: jaxlm {' '.join(words)}: {error}")
    assert not wrong and checked > 80, (wrong, checked)


def names_of_jaxlm(tree: ast.AST) -> Iterator[str]:
    """Yields the dotted names of the package that code uses or imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "jaxlm":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("jaxlm."):
            name = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", name):
                yield name


def resolve(name: str) -> Any:
    """Returns what a dotted name of the package stands for. AttributeError, ModuleNotFoundError: nothing."""
    value: Any = jaxlm
    path = "jaxlm"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if isinstance(value, ModuleType) and not hasattr(value, part):
            importlib.import_module(path)
        value = getattr(value, part)
    return value


def test_the_code_of_every_page_names_what_exists() -> None:
    blocks = [(page, block.text) for page, text in TEXT.items() for block in pages.blocks(text)
              if block.language == "python"]  # fmt: skip
    for page, code in blocks:
        compile(code, page, "exec")
        for name in names_of_jaxlm(ast.parse(code)):
            resolve(name)
    assert len(blocks) > 10


def fields_of_runs() -> set[str]:
    """Returns the paths of all fields that a run may have, whatever its model, objective and adapter."""
    parts = {"model": MODELS, "objective": OBJECTIVES, "adapter": METHODS}
    out = set(config_io.flatten(jaxlm.load("tiny_llama")))
    for part, table in parts.items():
        for name in table:
            kind = table.find(name, part).Config
            out |= {f"{part}.{field}" for field in kind.__dataclass_fields__}
    return out


def test_every_equivalent_exists() -> None:
    """The second column of the tables holds fields, commands and names of the library, and nothing else."""
    helps = {command: HOOKS.help_of(*command.split()) for command in cli.COMMANDS}
    fields, cells = fields_of_runs(), []
    rows = [row for row in TEXT["docs/coming-from.md"].splitlines() if row.startswith("| ") and " | here |" not in row]
    for row in rows:
        there, here, differs = (cell.strip() for cell in row.strip("|").split(" | ", 2))
        spans = re.findall(r"`([^`]+)`", here)
        assert spans or here == "–", f"{there}: {here}"
        cells += spans
        cells += re.findall(r"`((?:train|optim|mesh|execution)\.\w+)`", differs)
    for cell in cells:
        if cell.startswith("jaxlm."):
            resolve(cell)
        elif cell.startswith("jaxlm "):
            check_command(cell.split()[1:], "docs/coming-from.md", helps, ROOT)
        else:
            assert cell in fields, cell
    assert len(rows) > 70


def test_the_reference_shows_every_name_and_every_part() -> None:
    shown = re.findall(r"^::: (\S+)$", "\n".join(TEXT.values()), re.MULTILINE)
    objects = [resolve(name) for name in shown]
    missing = [name for name in jaxlm.__all__ if not any(getattr(jaxlm, name) is thing for thing in objects)]
    assert not missing
    for page, table in (("models", MODELS), ("objectives", OBJECTIVES), ("adapters", METHODS)):
        headings = anchors(TEXT[f"docs/reference/{page}.md"])
        for name in set(table) - {"none"}:
            assert table.find(name, page).Config in objects and name in headings, f"{page}: {name}"


def test_the_site_lists_every_page() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in DOCS}
    assert listed == written | set(HOOKS.generated())


def test_shown_lines_are_compared_without_figures() -> None:
    printed = pages.without_figures("step 60/60  loss 3.0502  lr 3.00e-04  46k tok/s  data 2%  ETA 0s")
    assert printed == pages.without_figures("step 60/60  loss 2.9  lr 3.00e-04  5.4k tok/s  data 0%  ETA 11s")
    assert printed != pages.without_figures("step 60/60  lost 3.0502  lr 3.00e-04  46k tok/s  data 2%  ETA 0s")
    page = '```bash title="Needs a GPU"\nx\n```\n\n```python title="a.py"\n1\n```\n```bash\ny\n```\n```text\nz\n```\n'
    assert [(b.language, b.runs) for b in pages.blocks(page)] == [
        ("bash", False), ("python", False), ("bash", True), ("text", False)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_as_written_and_prints_what_it_shows(path: Path, tmp_path: Path) -> None:
    programs, folder = tmp_path / "bin", tmp_path / "work"
    programs.mkdir()
    folder.mkdir()
    python = shlex.quote(sys.executable)
    for name, command in (("jaxlm", f"{python} -m jaxlm"), ("python", python)):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
    }  # fmt: skip
    for ran in pages.run(path.read_text("utf-8"), folder, env):
        printed = {pages.without_figures(line) for line in ran.output.splitlines()}
        missing = [line for line in ran.shown if line.strip() and pages.without_figures(line) not in printed]
        assert not missing, f"{ran.block.text}\nprints no longer: {missing}\nbut: {ran.output}"
