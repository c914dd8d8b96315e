"""The fenced blocks of Markdown pages are read here, and run as a reader would who pastes them from top to bottom.

    python tests/support/pages.py docs/tutorials/extend-it.md    # in the working directory, by the `jaxlm` on PATH

A `bash` block is run, unless its title begins with "Needs": it then needs what a test doesn't have. A `python` block is
the file that its title names. `text` blocks are lines that the block before them printed.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?(?: ?[kMGTP]\b| ?[kMGT]?i?B\b| m?s\b)?")


class Block(NamedTuple):
    language: str
    title: str
    """Of a file, or what the block needs."""
    text: str

    @property
    def runs(self) -> bool:
        """Returns whether a reader without accelerators, clusters and networks can run it."""
        return self.language == "bash" and not self.title.startswith("Needs")


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page."""
    return [Block(m["language"], m["title"] or "", m["text"]) for m in FENCE.finditer(page)]


class Ran(NamedTuple):
    block: Block
    output: str
    shown: list[str]
    """The lines that the page shows of the output."""
    seconds: float


def run(page: str, folder: Path, env: Mapping[str, str]) -> Iterator[Ran]:
    """Runs a page's blocks in a folder, one after another. RuntimeError: one of them failed."""
    rest = blocks(page)
    while rest:
        block = rest.pop(0)
        if block.language == "python" and block.title:
            (folder / block.title).write_text(block.text)
        if not block.runs:
            continue
        started = time.monotonic()
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{block.text}\nended with status {done.returncode}:\n{done.stdout}")
        shown: list[str] = []
        while rest and rest[0].language == "text":
            shown += rest.pop(0).text.splitlines()
        yield Ran(block, done.stdout, shown, time.monotonic() - started)


def without_figures(line: str) -> str:
    """Returns a line without what differs between machines: numbers, spaces and rules of tables."""
    return " ".join(NUMBER.sub("#", re.sub(r"[─━═]+", "─", line)).split())


if __name__ == "__main__":
    total = 0.0
    for ran in run(Path(sys.argv[1]).read_text("utf-8"), Path.cwd(), os.environ):
        print(f"$ {ran.block.text}{ran.output}({ran.seconds:.1f} s)\n", flush=True)
        total += ran.seconds
    print(f"{sys.argv[1]}: {total:.0f} s")
