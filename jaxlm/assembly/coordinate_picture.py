"""Draws a coordinate check: sizes of activations and their changes over the width, a line for each step."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.assembly.coordinate_check import Result

FORMATS = (".png", ".svg", ".pdf")
ROWS = {"sizes": "mean |x|", "changes": "mean |x − x before|"}


def check_place(path: Path) -> None:
    """Refuses, before the work, a picture that couldn't be drawn or written. ValueError: one line says why."""
    if path.suffix not in FORMATS:
        raise ValueError(f"picture: {path} is none of {', '.join(FORMATS)}; name a file that ends so")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"picture: {path}: there is no such folder; make it first")
    _figure((1, 1))


def draw(result: Result, path: Path) -> None:
    """Writes the picture of a check. Kinds of activations have a column each, as means over layers."""
    kinds = list(dict.fromkeys(a.kind for a in result.activations))
    figure = _figure((2.1 * len(kinds) + 0.8, 5.2))
    verdict = "passes" if not result.faults else f"fails at {len(result.faults)} of {len(result.activations)}"
    figure.suptitle(f"coordinate check: {verdict}", fontsize=12)
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")  # so that what is flat looks so
    for column, kind in enumerate(kinds):
        of_kind = [a for a in result.activations if a.kind == kind]
        for row, (field, label) in enumerate(ROWS.items()):
            values = np.mean([getattr(a, field) for a in of_kind], 0)
            _panel(panels[row, column], of_kind[0].widths, values, first=field == "sizes")
            panels[row, column].set_title(kind if row == 0 else "", fontsize=10)
            panels[row, 0].set_ylabel(label, fontsize=9)
        panels[1, column].set_xlabel("width", fontsize=9)
    panels[0, 0].legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=130, facecolor="white")


def _panel(axes: Any, widths: tuple[int, ...], values: np.ndarray, first: bool) -> None:
    """Draws a line for each number of updates; that before the first one only of sizes, since no change is there."""
    updates = len(values) - 1
    for t in range(0 if first else 1, updates + 1):
        shade = 0.15 + 0.75 * t / max(1, updates)
        axes.plot(widths, values[t], marker="o", markersize=3, color=(0.1, 0.35, 0.65, shade), label=f"after {t}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [str(w) for w in widths])
    axes.tick_params(labelsize=8)
    axes.grid(linewidth=0.4)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('picture: needs matplotlib: pip install "jaxlm[report]"') from error
    return Figure(figsize=size, layout="constrained")  # not pyplot: that would change global state
