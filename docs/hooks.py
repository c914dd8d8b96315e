"""Hooks of mkdocs: pages made from what stands elsewhere, so that nothing is told twice.

The command line's help is asked of the commands; CONTRIBUTING.md, the changelog, the guide to launchers and the
examples become pages of the site, and links to them stay right both here and on the site.
"""

import contextlib
import functools
import io
import os
import posixpath
import re
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
PAGES = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "launch/README.md": "how-to/launch.md",
    "examples/README.md": "examples/index.md",
}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def examples() -> list[Path]:
    """Returns the example scripts."""
    return sorted((ROOT / "examples").glob("*.py"))


def pages() -> dict[str, str]:
    """Returns the site's page for each file outside of `docs` that has one, by paths."""
    return PAGES | {f"examples/{path.name}": f"examples/{path.stem}.md" for path in examples()}


@functools.cache
def help_of(*command: str) -> str:
    """Returns what a command prints for `--help`."""
    from jaxlm.commands import cli

    out = io.StringIO()
    # One width, whatever the terminal: 80 columns fit a page.
    with mock.patch.dict(os.environ, COLUMNS="80", NO_COLOR="1"), contextlib.redirect_stdout(out):
        try:
            status = cli.main([*command, "--help"])
        except SystemExit as ended:
            status = ended.code
    if status:
        raise ValueError(f"jaxlm {' '.join(command)} --help ended with status {status}")
    return out.getvalue()


def command_line() -> str:
    """Returns the page of all commands with their help."""
    from jaxlm.commands import cli

    parts = [
        "# The command line\n",
        "What every command says when it is asked with `--help`. `train`, `coordinate`, `work`, `plan`, `tune`,",
        "`coordinate-check` and `data` also take every field of a run as an option, as `--optim.lr 1e-3` or",
        "`--train.batch-size 8`: see",
        "[the run](run.md).\n",
        f"```text\n{help_of().rstrip()}\n```\n",
    ]
    for command in cli.COMMANDS:
        parts.append(f"## jaxlm {command}\n\n```text\n{help_of(*command.split()).rstrip()}\n```\n")
    return "\n".join(parts)


def moved_links(text: str, source: str, page: str) -> str:
    """Returns a page's text with links that are right on the site. `source` is the path of the text in the checkout,
    `page` that of its page in the site; links to files that have no page stay as they are."""
    where = pages()

    def move(match: re.Match[str]) -> str:
        target, hash_, anchor = match["target"].partition("#")
        if not target or ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        moved = where.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if not moved:
            return match[0]
        new = posixpath.relpath(moved, posixpath.dirname(page) or ".") + hash_ + anchor
        return match[0].removesuffix(f"({match['target']})") + f"({new})"

    return LINK.sub(move, text)


def generated() -> dict[str, str]:
    """Returns the text of each page that isn't written in `docs`, by its path in the site."""
    out = {page: moved_links((ROOT / path).read_text("utf-8"), path, page) for path, page in PAGES.items()}
    for path in examples():
        out[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```python\n{path.read_text('utf-8').rstrip()}\n```\n"
    return out | {"reference/command-line.md": command_line()}


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Moves the links of written pages; those of generated ones are right."""
    path = page.file.src_uri
    return markdown if page.file.generated_by else moved_links(markdown, f"docs/{path}", path)
