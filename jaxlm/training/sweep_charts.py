"""Draws the charts of a sweep's page as SVG: history, validations, importances, slices and parallel coordinates."""

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WIDE, HIGH = 460.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 12.0, 38.0


def text(value: Any) -> str:
    """Returns a value as text without markup."""
    return html.escape(str(value), quote=True)


def shown(value: Any) -> str:
    """Returns a value as people read it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scale:
    """A Scale maps values to places on a chart; values beyond its ends stand at the ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Returns the place of a value."""
        a, b, x = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        share = min(1.0, max(0.0, (x - a) / (b - a))) if b > a else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Returns a few round values between the ends."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5)):
                found = [f * 10.0**k for k in decades for f in factors if self.low <= f * 10.0**k <= self.high]
                if len(found) >= 3:
                    break
            return found
        if self.high <= self.low:
            return [self.low]
        raw = (self.high - self.low) / 4
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * f for f in (1, 2, 5, 10) if size * f >= raw)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + i) * step for i in range(count)]


def value_scale(trials: Sequence[dict], start: float, end: float) -> Scale:
    """Returns the scale of trials' values; a few that are far from all others don't squeeze these together."""
    known = sorted(t["value"] for t in trials if t["value"] is not None and t["state"] != "failed")
    if not known:
        return Scale(0.0, 1.0, start, end)
    low, high = known[0], known[-1]
    if len(known) >= 4:
        q1, _, q3 = statistics.quantiles(known, n=4)
        low, high = max(low, q1 - 3 * (q3 - q1)), min(high, q3 + 3 * (q3 - q1))
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return Scale(low - margin, high + margin, start, end)


def _svg(body: str, label: str, wide: float = WIDE, high: float = HIGH) -> str:
    return f'<svg viewBox="0 0 {wide:g} {high:g}" role="img" aria-label="{text(label)}">{body}</svg>'


def _frame(x: Scale | None, y: Scale, x_name: str, y_name: str, places: Sequence[tuple[float, str]] = ()) -> str:
    """Draws axes: those of two scales, or named places in place of the first."""
    ticks = [(x(v), f"{v:g}") for v in x.ticks()] if x is not None else places
    middle, half_way = (LEFT + WIDE - RIGHT) / 2, (TOP + HIGH - BOTTOM) / 2
    out = [
        f'<text class=name x="{middle:g}" y="{HIGH - 4:g}" text-anchor=middle>{text(x_name)}</text>',
        f'<text class=name transform="translate(12 {half_way:g}) rotate(-90)" text-anchor=middle>{text(y_name)}</text>',
    ]
    for at, name in ticks:
        out.append(f'<text x="{at:.1f}" y="{HIGH - BOTTOM + 16:g}" text-anchor=middle>{text(name)}</text>')
    for v in y.ticks():
        out.append(f'<path class=grid d="M{LEFT:g} {y(v):.1f}H{WIDE - RIGHT:g}"/>'
                   f'<text x="{LEFT - 6:g}" y="{y(v) + 4:.1f}" text-anchor=end>{v:g}</text>')  # fmt: skip
    return "".join(out)


def about(trial: dict, metric: str) -> str:
    """Returns what a trial's mark says when it is pointed at."""
    params = ", ".join(f"{path} {shown(value)}" for path, value in trial["params"].items())
    state = {"pruned": " (stopped early)", "failed": f" (failed: {trial['reason']})"}.get(trial["state"], "")
    return f"trial {trial['number']}: {metric} {shown(trial['value'])}{state}; {params}"


def _mark(x: float, y: float, trial: dict, results: dict[str, Any]) -> str:
    kind = "best" if trial["number"] == results["best"] else trial["state"]
    title = f"<title>{text(about(trial, results['metric']))}</title>"
    if kind == "failed":
        return f'<path class=failed d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8">{title}</path>'
    return f'<circle class={kind} cx="{x:.1f}" cy="{y:.1f}" r="{6 if kind == "best" else 4}">{title}</circle>'


def _ended(results: dict[str, Any]) -> list[dict]:
    return [t for t in results["trials"] if t["state"] != "running"]


def history(results: dict[str, Any]) -> str:
    """Draws the value of each trial, and the best so far."""
    trials = _ended(results)
    x = Scale(-0.5, max(t["number"] for t in trials) + 0.5, LEFT, WIDE - RIGHT)
    y = value_scale(trials, HIGH - BOTTOM, TOP)
    best, points = None, []
    for t in trials:
        if t["state"] == "complete":
            best = t["value"] if best is None else (min if results["lower"] else max)(best, t["value"])
        if best is not None:
            points.append(f"{x(t['number']):.1f} {y(best):.1f}")
    line = f'<path class=record d="M{"L".join(points)}"/>' if points else ""
    marks = [_mark(x(t["number"]), y(t["value"]) if t["value"] is not None else HIGH - BOTTOM, t, results)
             for t in trials]  # fmt: skip
    ticks = Scale(0, max(4, trials[-1]["number"]), 0, 1).ticks()
    places = [(x(v), f"{v:g}") for v in ticks if v == int(v) and v <= trials[-1]["number"]]
    return _svg(_frame(None, y, "trial", results["metric"], places) + line + "".join(marks), "History")


def curves(results: dict[str, Any]) -> str:
    """Draws the validations of each trial before its end, and its end."""
    trials = [t for t in _ended(results) if t["steps"] and t["state"] != "failed"]
    if not trials:
        return ""
    every = [{"value": v, "state": "complete"} for t in trials for _, v in t["steps"]] + trials
    longest = max([results["steps"], *(step for t in trials for step, _ in t["steps"])])
    x, y = Scale(0, longest, LEFT, WIDE - RIGHT), value_scale(every, HIGH - BOTTOM, TOP)
    lines = []
    for t in sorted(trials, key=lambda t: (t["number"] == results["best"], t["state"] == "complete")):
        points = [(step, value) for step, value in t["steps"] if value is not None]
        if t["state"] == "complete" and len(results["seeds"]) == 1:
            points.append((results["steps"], t["value"]))
        kind = "best" if t["number"] == results["best"] else t["state"]
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        end = f'<circle class={kind} cx="{x(points[-1][0]):.1f}" cy="{y(points[-1][1]):.1f}" r="3"/>' if points else ""
        title = f"<title>{text(about(t, results['metric']))}</title>"
        lines.append(f'<g><path class="curve {kind}" d="M{path}"/>{end}{title}</g>' if points else "")
    return _svg(_frame(x, y, "step", results["metric"]) + "".join(lines), "Validations")


def importances(results: dict[str, Any]) -> str:
    """Draws the share of each field in what makes trials good."""
    shares = sorted(results["importances"].items(), key=lambda item: -item[1])
    if not shares:
        return ""
    high = 34.0 * len(shares) + 12
    rows = []
    for i, (path, share) in enumerate(shares):
        y = 34.0 * i
        rows.append(f'<text x="0" y="{y + 14:g}">{text(path)}</text><text x="{WIDE:g}" y="{y + 14:g}" text-anchor=end>'
                    f'{share:.0%}</text><rect class=bar x="0" y="{y + 19:g}" width="{max(1.0, WIDE * share):.1f}" '
                    f'height="8" rx="2"/>')  # fmt: skip
    return _svg("".join(rows), "Importances", high=high)


def _place(path: str, results: dict[str, Any], start: float, end: float) -> tuple[Callable[[Any], float], list]:
    """Returns the places of a field's values between two ends, and the names beside the axis."""
    d = results["space"][path]
    if "choices" in d:
        n = len(d["choices"])
        at = {str(v): start + (end - start) * (i + 0.5) / n for i, v in enumerate(d["choices"])}
        return lambda v: at[str(v)], [(place, name[:14]) for name, place in at.items()]
    room = 0.0 if d["log"] else 0.04 * (d["high"] - d["low"])
    factor = (d["high"] / d["low"]) ** 0.04 if d["log"] else 1.0
    scale = Scale(d["low"] / factor - room, d["high"] * factor + room, start, end, d["log"])
    return scale, [(scale(v), f"{v:g}") for v in scale.ticks() if d["low"] <= v <= d["high"]]


def slices(results: dict[str, Any]) -> list[str]:
    """Draws a chart for each field: the trials' values by the field's."""
    trials, out = _ended(results), []
    y = value_scale(trials, HIGH - BOTTOM, TOP)
    for path in results["space"]:
        x, places = _place(path, results, LEFT, WIDE - RIGHT)
        marks = []
        for t in sorted(trials, key=lambda t: (t["number"] == results["best"], t["state"] == "complete")):
            height = y(t["value"]) if t["value"] is not None else HIGH - BOTTOM
            marks.append(_mark(x(t["params"][path]), height, t, results))
        out.append(_svg(_frame(None, y, path, results["metric"], places) + "".join(marks), f"Values by {path}"))
    return out


def parallel(results: dict[str, Any]) -> str:
    """Draws a line for each trial through its fields' values to its own: the better, the darker."""
    trials = [t for t in _ended(results) if t["state"] != "failed" and t["value"] is not None]
    if not trials:
        return ""
    wide, high, top, bottom = 960.0, 320.0, 34.0, 300.0
    names = [*results["space"], results["metric"]]
    at = [70 + (wide - 190) * i / (len(names) - 1) for i in range(len(names))]
    scales = [_place(path, results, bottom, top) for path in results["space"]]
    last = value_scale(trials, bottom, top)
    scales.append((last, [(last(v), f"{v:g}") for v in last.ticks()]))
    ranked = sorted(trials, key=lambda t: t["value"] * (-1 if results["lower"] else 1))  # the best comes last
    lines = []
    for rank, t in enumerate(ranked):
        values = [*(t["params"][path] for path in results["space"]), t["value"]]
        points = "L".join(f"{x:.1f} {place(v):.1f}" for x, (place, _), v in zip(at, scales, values, strict=True))
        kind = "best" if t["number"] == results["best"] else t["state"]
        strength = 1.0 if kind == "best" else 0.15 + 0.65 * rank / max(1, len(ranked) - 1)
        lines.append(f'<path class="curve {kind}" style="opacity:{strength:.2f}" d="M{points}">'
                     f"<title>{text(about(t, results['metric']))}</title></path>")  # fmt: skip
    lines.sort(key=lambda line: 'curve best"' in line)
    axes = []
    for x, name, (_, places) in zip(at, names, scales, strict=True):
        axes.append(f'<path class=axis d="M{x:.1f} {top:g}V{bottom:g}"/><text class=name x="{x:.1f}" y="{top - 14:g}" '
                    f"text-anchor=middle>{text(name)}</text>")  # fmt: skip
        axes += [
            f'<text class=halo x="{x + 7:.1f}" y="{place + 4:.1f}">{text(label)}</text>' for place, label in places
        ]
    return _svg("".join(lines) + "".join(axes), "Parallel coordinates", wide, high)
