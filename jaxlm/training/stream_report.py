"""Puts a stream on one page, from its results alone: the matrix of scores, what they say, and what it cost."""

import json
import math
from pathlib import Path
from typing import Any

from jaxlm.training.board import single_file
from jaxlm.training.board.sections import Section, cell, section, warnings
from jaxlm.training.board.sections import table as table_block

MEANING = {
    "average": "average of all stages at the end",
    "average_along": "average over the stages seen, along the stream",
    "learned": "average right after learning each",
    "forgetting": "forgetting: best ever less the end",
    "backward": "backward transfer: the end less right after learning",
    "forward": "forward transfer: before learning less before the stream",
    "below_joint": "below training on all stages at once",
    "below_single": "below each stage trained by itself",
}


INFERRED = (
    "task right: the share of a stage's rows whose task the last model infers from the base's states. Scores are with "
    "the right one"
)


def table(results: dict[str, Any]) -> str:
    """Returns the mean matrix, the figures, the costs and the warnings as text."""
    names, matrix = results["stages"], mean_matrix(results)
    width = max(map(len, [*names, "before"])) + 6
    head = " " * width + "".join(f"{name:>{max(10, len(name) + 2)}}" for name in names)
    rows = ["before", *(f"after {name}" for name in names)]
    lines = [head] + [
        f"{row:{width}}" + "".join(f"{_number(x):>{max(10, len(n) + 2)}}" for n, x in zip(names, values, strict=True))
        for row, values in zip(rows, matrix, strict=True)
    ]
    lines += [
        f"{'':{width}}"
        + "".join(f"{m[:9]:>{max(10, len(n) + 2)}}" for n, m in zip(names, results["metrics"], strict=True))
    ]
    if "inferred" in results:
        shares = zip(names, mean_of(results["inferred"])[-1], strict=True)
        lines += [f"{'task right':{width}}" + "".join(f"{_number(x):>{max(10, len(n) + 2)}}" for n, x in shares)]
        lines += ["", INFERRED]
    lines += ["", f"{_seeds(results)}; scores of which less is better count with their sign turned"]
    for name, (mean, low, high) in results["figures"].items():
        between = "" if math.isnan(low) else f"  {low:.4f} … {high:.4f}"
        lines.append(f"{MEANING[name]:58} {_number(mean)}{between}")
    lines += ["", *_aligned(*costs(results))]
    lines += [f"warning: {line}" for line in results.get("warnings", ())]
    return "\n".join(lines)


def _aligned(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Returns a table as lines of text."""
    every = [["", *heads], *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return ["  ".join(x.rjust(n) if k else x.ljust(n) for k, (x, n) in enumerate(zip(row, widths, strict=True)))
            for row in every]  # fmt: skip


def _with_numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the results with NaN where JSON has null."""
    number = lambda x: math.nan if x is None else x  # noqa: E731
    return results | {
        "matrices": [[[number(x) for x in row] for row in matrix] for matrix in results["matrices"]],
        "figures": {name: [number(x) for x in ends] for name, ends in results["figures"].items()},
    } | ({"inferred": [[[number(x) for x in row] for row in m] for m in results["inferred"]]}
         if "inferred" in results else {})  # fmt: skip


def mean_matrix(results: dict[str, Any]) -> list[list[float]]:
    """Returns the mean of the scores over seeds, `[T + 1][T]`."""
    return mean_of(results["matrices"])


def mean_of(matrices: list[list[list[float]]]) -> list[list[float]]:
    """Returns the mean of matrices, one a seed."""
    n = len(matrices)
    return [[sum(values) / n for values in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def is_stream(results: dict[str, Any]) -> bool:
    """Returns whether values are the results of a stream."""
    return {"stages", "matrices", "figures", "seeds", "methods"} <= results.keys()


def build(folder: Path) -> tuple[dict[str, Any], Path]:
    """Writes `report.html` into a stream's directory; returns the results and the page's path. ValueError: the stream
    isn't finished."""
    file = folder / "results.json"
    if not file.is_file():
        raise ValueError(f"{folder}: the stream isn't finished; go on with: jaxlm continual CONFIG")
    results = _with_numbers(json.loads(file.read_text("utf-8")))
    page = folder / "report.html"
    page.write_text(single_file.page(folder.name, [view(folder.name, folder.name, results)]), "utf-8")
    return results, page


def view(id: str, name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Returns what a page shows of a stream, as values that JSON has: sections alone, for it has no curves of its
    own."""
    results, stages = _with_numbers(results), len(results["stages"])
    made = sections(results)
    methods = ", ".join(results["methods"]) or "no method"
    brief = {
        "name": name, "state": "finished", "says": "", "step": stages, "steps": stages, "updated": 0.0, "loss": None,
        "alerts": [], "about": f"{stages} stages · {methods} · {_seeds(results)}",
    }  # fmt: skip
    return {
        "id": id, "kind": "stream", "reset": True, "cursor": "", "whole": 1.0, "brief": brief, "panels": [],
        "sections": made, "order": [one["id"] for one in made], "config": {},
    }  # fmt: skip


def sections(results: dict[str, Any]) -> list[Section]:
    """Returns the sections of a stream's page in their order."""
    lines = results.get("warnings", ())
    inferred = [_inferred(results)] if "inferred" in results else []
    notes = [section("warnings", "", warnings(lines))] if lines else []
    return [*notes, _scores(results), *inferred, _figures(results), _cost(results)]


def _about(*lines: str) -> dict[str, Any]:
    return {"kind": "lines", "lines": list(lines)}


def _scores(results: dict[str, Any]) -> Section:
    """Shows the matrix; a cell's shade is its place between the worst and the best score of its column."""
    matrix, names, lower = mean_matrix(results), results["stages"], results["lower_is_better"]
    ends = []
    for j in range(len(names)):
        column = [row[j] for row in matrix if not math.isnan(row[j])]
        ends.append((max(column), min(column)) if lower[j] else (min(column), max(column)))

    def shaded(value: float, j: int, learned: bool) -> Any:
        if math.isnan(value):
            return "–"
        worst, best = ends[j]
        return cell(_number(value), shade=(value - worst) / (best - worst) if best != worst else 1.0, edge=learned)

    heads = ["", *(f"{name}\n{metric}{' ↓' if low else ''}"
                   for name, metric, low in zip(names, results["metrics"], lower, strict=True))]  # fmt: skip
    rows = [
        [row, *(shaded(value, j, i == j + 1) for j, value in enumerate(values))]
        for i, (row, values) in enumerate(zip(["before", *(f"after {n}" for n in names)], matrix, strict=True))
    ]
    note = (
        "Mean over seeds. Outlined: right after learning that stage. ↓: less is better. Darker is better in its column."
    )
    return section("scores", "Scores", table_block(heads, rows), _about(note))


def _inferred(results: dict[str, Any]) -> Section:
    """Shows the shares of rows whose task is inferred right."""
    names = results["stages"]
    rows = [[f"after {name}", *map(_number, values)]
            for name, values in zip(names, mean_of(results["inferred"]), strict=True)]  # fmt: skip
    note = (
        "Share of a stage's rows whose task is inferred right, of the tasks learned by then, from the base's states "
        "(linear discriminant). The scores above are with the right task."
    )
    return section("inferred", "Tasks inferred", table_block(["", *names], rows), _about(note))


def _figures(results: dict[str, Any]) -> Section:
    rows = [[MEANING[name], _number(mean), "" if math.isnan(low) else f"{low:.4f} … {high:.4f}"]
            for name, (mean, low, high) in results["figures"].items()]  # fmt: skip
    note = "Scores of which less is better have their sign turned, so that more is always better."
    return section("figures", "Figures", table_block(["", "mean", "95 % over seeds"], rows), _about(note))


COSTS = {
    "seconds": "seconds",
    "bytes_per_device": "memory a device",
    "added": "weights added",
    "added_bytes": "their bytes",
    "memory_disk_bytes": "kept on disk",
    "memory_device_bytes": "kept on devices",
    "examples": "rows kept",
    "tokens": "tokens kept",
    "kl_before": "KL from before",
}


def costs(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns that say anything, and a row of text for each run: its name, then its figures."""
    rows = {name: {"seconds": spent} | results.get("costs", {}).get(name, {})
            for name, spent in results["seconds"].items() if spent}  # fmt: skip
    names = [name for name in COSTS if any(row.get(name) for row in rows.values())]
    return [COSTS[name] for name in names], [[row, *(_figure(n, values.get(n)) for n in names)]
                                             for row, values in rows.items()]  # fmt: skip


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if "bytes" in name:
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:.4f}" if name == "kl_before" else f"{value:,.0f}"


def _cost(results: dict[str, Any]) -> Section:
    heads, rows = costs(results)
    about = (
        "Means over seeds. Weights added are heads and adapters. Kept is what methods of continual learning hold: on "
        "disk, and on devices beside the weights in training. KL from before is that of the model before to the model "
        "after on the stage's own validation inputs, in nats."
    )
    return section("cost", "Cost", table_block(["", *heads], rows), _about(about))


def _seeds(results: dict[str, Any]) -> str:
    n = len(results["seeds"])
    return f"{n} seed{'s' if n > 1 else ''}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"
