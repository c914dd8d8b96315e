"""`jaxlm report` rebuilds report.html and report.png from a run's logs."""

import argparse
from pathlib import Path
from typing import Any

from jaxlm.commands.arguments import add_command


def add_parsers(commands: Any) -> None:
    """Adds what this file's commands take to the parser of the command line."""
    p = add_command(commands, "report", _report, "rebuild report.html and report.png from a run's logs",
                "jaxlm report runs/quickstart")  # fmt: skip
    p.add_argument("model", metavar="RUN_DIR", type=Path)


def _report(args: argparse.Namespace, rest: list[str]) -> int:
    from jaxlm.training import report

    print(report.build(args.model))
    return 0
