"""Puts a run on a page, from its logs alone: `report.html`, the board's page with its data in it, and `report.png`."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.training.board import single_file, views
from jaxlm.training.log_table import Curve
from jaxlm.training.run_logs import Logs, read

POINTS = 1500  # a curve is thinned to about this many
INK, GRID, RAW, LINE, BEST = "#1b1f24", "#d9dde1", "#9db9d6", "#1f6fb2", "#c2571a"


@dataclass(frozen=True)
class Panel:
    """A Panel is a chart of one curve."""

    title: str
    curve: Callable[[Logs], Curve | None]
    smooth: bool = False
    lowest: bool = False
    """Whether the lowest point is marked."""
    dots: bool = False


PANELS = (
    Panel("Training loss", lambda r: r.train.curve("loss"), smooth=True),
    Panel("Validation loss", lambda r: r.valid_table.curve("loss"), lowest=True, dots=True),
    Panel("Validation bits per byte", lambda r: r.valid_table.curve("bits_per_byte"), lowest=True, dots=True),
    Panel("KL from the model before", lambda r: r.valid_table.curve("kl_before"), dots=True),
    Panel("Learning rate", lambda r: r.train.curve("lr")),
    Panel("Gradient norm", lambda r: r.train.curve("grad_norm"), smooth=True),
    Panel("Tokens per second", lambda r: r.train.curve("time/tokens_per_s"), smooth=True),
    Panel("Workers of a version", lambda r: r.train.curve("workers")),
    Panel("Staleness of pushes, versions", lambda r: r.train.curve("staleness")),
)


def _draw(axes: Any, panel: Panel, logs: Logs) -> None:
    curve = panel.curve(logs)
    assert curve is not None
    finite = [(y, x) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    marker = "o" if panel.dots or len(curve.x) == 1 else None
    if panel.smooth:
        axes.plot(*_thin(curve.x, curve.y), color=RAW, linewidth=0.8)
        axes.plot(*_thin(curve.x, smoothed(curve.y)), color=LINE, linewidth=1.6, marker=marker)
        # The range leaves out the first twentieth, which would press the rest of the curve flat.
        late = [y for y, _ in finite[len(finite) // 20 :]]
        if late:
            room = 0.08 * (max(late) - min(late)) or 1.0
            axes.set_ylim(min(late) - room, max(late) + room)
    else:
        axes.plot(*_thin(curve.x, curve.y), color=LINE, linewidth=1.6, marker=marker, markersize=3.5)
    if panel.lowest and finite:
        y, x = min(finite)
        axes.plot([x], [y], "o", color=BEST, markersize=6)
        axes.set_title(f"lowest {y:.4f}, step {x}", loc="right", fontsize=9, color=BEST)
    axes.set_title(panel.title, loc="left", fontsize=11, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.margins(x=0.02)
    for side in axes.spines.values():
        side.set_visible(False)


def smoothed(y: list[float]) -> list[float]:
    """Returns the mean over a fortieth of the curve around each point, less at the ends, so that it doesn't lag behind
    a curve that falls. Values that aren't finite are left out; where all are, they stay."""
    half = len(y) // 80
    out = []
    for i, value in enumerate(y):
        reach = min(half, i, len(y) - 1 - i)
        near = [v for v in y[i - reach : i + reach + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if near else value)
    return out


def _thin(x: list[int], y: list[float]) -> tuple[list[int], list[float]]:
    stride = max(1, len(x) // POINTS)
    keep = sorted({*range(0, len(x), stride), len(x) - 1})
    return [x[i] for i in keep], [y[i] for i in keep]


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('the report needs matplotlib: pip install "jaxlm[report]"') from error
    return Figure(figsize=size, layout="constrained")  # not pyplot: that would change global state


def _draw_png(panels: list[Panel], logs: Logs, path: Path) -> None:
    rows = math.ceil(len(panels) / 2)
    figure = _figure((11, 3.1 * rows + 0.5))
    figure.suptitle(logs.name, fontsize=13, color=INK)
    for i, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(rows, 2, i), panel, logs)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    figure.savefig(path, dpi=130, facecolor="white")


def build(run_dir: str | os.PathLike) -> Path:
    """Writes both files into the run directory; returns the path of the page. Raises ValueError if there is nothing to
    show."""
    folder = Path(run_dir)
    logs = read(folder)
    _draw_png([panel for panel in PANELS if panel.curve(logs)], logs, folder / "report.png")
    page = folder / "report.html"
    page.write_text(single_file.page(logs.name, [views.whole(logs)]), encoding="utf-8")
    return page
