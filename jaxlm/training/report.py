"""A run on one page: `report.html` (self-contained, light and dark) and `report.png`, from the run's logs alone."""

import html
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.training.log import read_lines
from jaxlm.training.progress import Ema

POINTS = 1500  # a curve is thinned to about this many, or a long run makes a page of 100 MB
INK, GRID, RAW, LINE, BEST = "#1b1f24", "#d9dde1", "#9db9d6", "#1f6fb2", "#c2571a"
# Matplotlib's colours become CSS variables in the page, so that the curves follow light and dark.
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", RAW: "var(--raw)", LINE: "var(--line)", BEST: "var(--best)"}


@dataclass(frozen=True)
class Logs:
    """What a run directory says."""

    name: str
    train: list[dict]
    valid: list[dict]
    samples: list[dict]
    events: dict[str, dict]
    """The last event of each name."""
    config: dict[str, Any]
    environment: dict[str, Any]
    gains: list[dict]
    """Validations beside that before the first step, of a run that starts from a model."""


def build(run_dir: str | os.PathLike) -> Path:
    """Write both files into the run directory; the path of the page. ValueError if there is nothing to show."""
    folder = Path(run_dir)
    logs = read(folder)
    panels = [panel for panel in PANELS if panel.curve(logs)]
    _draw_png(panels, logs, folder / "report.png")
    charts = [_svg(panel, logs) for panel in panels]
    page = folder / "report.html"
    page.write_text(_page(logs, charts), encoding="utf-8")
    return page


def read(folder: Path) -> Logs:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no metrics.jsonl: name the directory of a run")
    kinds: dict[str, list[dict]] = {"train": [], "valid": [], "sample": [], "event": []}
    for line in read_lines(path):
        kinds.setdefault(line["kind"], []).append(line)
    if not kinds["train"] and not kinds["valid"]:
        raise ValueError(f"{path} holds no training or validation line yet")
    config, environment = (_json(folder / name) for name in ("config.json", "environment.json"))
    events = {line.get("name", ""): line for line in kinds["event"]}
    name = str(config.get("name") or folder.resolve().name)
    gains = [line for line in kinds["event"] if line.get("name") == "gain"]
    return Logs(name, kinds["train"], kinds["valid"], kinds["sample"], events, config, environment, gains)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


# ---- curves


@dataclass(frozen=True)
class Curve:
    x: list[int]
    y: list[float]


@dataclass(frozen=True)
class Panel:
    title: str
    curve: Callable[[Logs], Curve | None]
    smooth: bool = False
    lowest: bool = False
    """Mark the lowest point."""
    dots: bool = False


def _metric(lines: list[dict], name: str, *, time: bool = False) -> Curve | None:
    """Values by step; "NaN" and its kin become gaps."""
    found = [(line["step"], (line.get("time", {}) if time else line).get(name)) for line in lines]
    kept = [(step, float(value)) for step, value in found if isinstance(value, int | float | str)]
    return Curve([step for step, _ in kept], [value for _, value in kept]) if kept else None


PANELS = (
    Panel("Training loss", lambda r: _metric(r.train, "loss"), smooth=True),
    Panel("Validation loss", lambda r: _metric(r.valid, "loss"), lowest=True, dots=True),
    Panel("Validation bits per byte", lambda r: _metric(r.valid, "bits_per_byte"), lowest=True, dots=True),
    Panel("Learning rate", lambda r: _metric(r.train, "lr")),
    Panel("Gradient norm", lambda r: _metric(r.train, "grad_norm"), smooth=True),
    Panel("Tokens per second", lambda r: _metric(r.train, "tokens_per_s", time=True), smooth=True),
)


def _draw(axes: Any, panel: Panel, logs: Logs) -> None:
    curve = panel.curve(logs)
    assert curve is not None
    finite = [(y, x) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    marker = "o" if panel.dots or len(curve.x) == 1 else None
    if panel.smooth:
        ema = Ema(0.98 if len(curve.y) > 200 else 0.9)
        axes.plot(*_thin(curve.x, curve.y), color=RAW, linewidth=0.8)
        axes.plot(*_thin(curve.x, [ema.update(y) for y in curve.y]), color=LINE, linewidth=1.6, marker=marker)
        # Without its first twentieth, which would press the rest of the curve flat.
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


def _svg(panel: Panel, logs: Logs) -> str:
    import matplotlib

    figure = _figure((5.4, 2.9))
    _draw(figure.add_subplot(), panel, logs)
    out = io.StringIO()
    # Text stays text (it can be selected and takes the page's font) and the same run gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


# ---- the page


def _page(logs: Logs, charts: list[str]) -> str:
    family = logs.config.get("model", {}).get("family")
    devices = logs.environment.get("devices", {})
    device = f"{devices.get('count')} × {devices.get('kind')}" if devices else None
    subtitle = " · ".join(str(x) for x in (family, logs.config.get("objective", {}).get("family"), device) if x)
    body = [
        f"<header><h1>{_e(logs.name)}</h1><p>{_e(subtitle)}</p></header>",
        _summary(logs),
        _before_and_after(logs),
        _compression(logs),
        "<h2>Curves</h2><div class=charts>" + "".join(f"<figure>{chart}</figure>" for chart in charts) + "</div>",
        _samples(logs.samples),
        _sections("Config", logs.config),
        _sections("Environment", logs.environment),
    ]
    return PAGE.replace("@TITLE@", _e(logs.name)).replace("@BODY@", "\n".join(filter(None, body)))


def _summary(logs: Logs) -> str:
    """The figures that one asks for first; those that the logs don't tell are left out."""
    rows: list[tuple[str, str]] = []
    for name, title in (("bits_per_byte", "bits per byte"), ("loss", "validation loss")):
        curve = _metric(logs.valid, name)
        finite = [(y, x) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)] if curve else []
        if curve and finite:
            best, step = min(finite)
            rows += [(f"Best {title}", f"{best:.4f} <small>step {step}</small>")]
            rows += [(f"Final {title}", f"{curve.y[-1]:.4f}")]
    speed, tokens = _median(logs, "tokens_per_s"), _tokens(logs)
    model = logs.events.get("model", {})
    rows += [("Steps", f"{max(line['step'] for line in [*logs.train, *logs.valid]):,}")]
    rows += [("Tokens", _count(tokens))] if tokens else []
    rows += [("Time", _duration(seconds))] if (seconds := _elapsed(logs)) else []
    rows += [("Tokens per second", f"{speed:,.0f}")] if speed else []
    mfu = [(_median(logs, f"mfu_{way}"), way) for way in ("causal", "full")]
    rows += [(f"MFU, {way} attention", f"{value:.1%}") for value, way in mfu if value]
    parameters, trainable = (model.get(key) for key in ("parameters", "trainable"))
    rows += [("Parameters", _count(parameters))] if parameters else []
    rows += [("Trainable parameters", _count(trainable))] if trainable and trainable != parameters else []
    cells = "".join(f"<div><dt>{_e(name)}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f"<dl class=summary>{cells}</dl>"


def gain(logs: Logs) -> dict | None:
    """What the step that the run is used at changed: the best one's where it says so, else the last one's."""
    best = [line for line in logs.gains if line.get("best")]
    found = best if best and logs.config.get("train", {}).get("use") == "best" else logs.gains
    return found[-1] if found else None


def _before_and_after(logs: Logs) -> str:
    found = gain(logs)
    if found is None:
        return ""
    rows = []
    for name, f in found["figures"].items():
        cells = [_within(f["against"], f["against_interval"]), _within(f["value"], f["interval"]),
                 _within(f["difference"], f["difference_interval"], "+"), f"{f['p']:.4f}", _e(f["over"])]  # fmt: skip
        rows.append(f"<tr><th>{_e(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = "".join(f"<td>{head}</td>" for head in ("before", "after", "difference", "p", "over"))
    note = f"{_e(logs.config.get('start') or 'its start')} and step {found['step']}; 95 % intervals, paired bootstrap"
    if found.get("best") and logs.config.get("train", {}).get("use") == "best":
        note += "; the step was chosen on these very examples, which flatters it"
    table = f"<table class=gain><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
    return f"<h2>Before and after <small>{note}</small></h2>{table}"


def _within(value: Any, ends: list, sign: str = "") -> str:
    """Numbers that are none come as text."""
    shown = [f"{x:{sign}.4g}" if isinstance(x, int | float) else _e(x) for x in (value, *ends)]
    return f"{shown[0]} <small>{shown[1]} … {shown[2]}</small>"


def _compression(logs: Logs) -> str:
    """The model beside general compressors, in bits per byte of the same text."""
    event = logs.events.get("compression")
    if event is None:
        return ""
    sizes = {k: float(v) for k, v in event.items() if isinstance(v, int | float) and k not in ("step", "kind", "name")}
    curve = _metric(logs.valid, "bits_per_byte")
    if curve and "model" not in sizes and any(map(math.isfinite, curve.y)):
        sizes["this model"] = min(filter(math.isfinite, curve.y))
    widest = max(sizes.values(), default=1.0)
    bars = "".join(
        f"<tr><th>{_e(name)}</th><td><i style='width:{100 * size / widest:.1f}%'"
        f"{' class=own' if 'model' in name else ''}></i></td><td>{size:.3f}</td></tr>"
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    )
    return f"<h2>Compression <small>bits per byte of the validation text</small></h2><table class=bars>{bars}</table>"


def _samples(samples: list[dict]) -> str:
    """The first and the last text for each prompt, side by side."""
    prompts: dict[str, list[dict]] = {}
    for line in samples:
        prompts.setdefault(line["prompt"], []).append(line)
    if not prompts:
        return ""
    pairs = []
    for prompt, lines in prompts.items():
        shown = [lines[0]] if len(lines) == 1 else [lines[0], lines[-1]]
        cells = "".join(
            f"<div><h3>step {_e(line['step'])}</h3><pre><b>{_e(prompt)}</b>{_e(line['text'])}</pre></div>"
            for line in shown
        )
        pairs.append(f"<div class=pair>{cells}</div>")
    return "<h2>Samples <small>first and last</small></h2>" + "".join(pairs)


def _sections(title: str, values: dict[str, Any]) -> str:
    """Nested values as one table for each section; what has no section comes first."""
    if not values:
        return ""
    loose = {k: v for k, v in values.items() if not isinstance(v, dict)}
    nested = {k: v for k, v in values.items() if isinstance(v, dict) and v}
    tables = []
    for name, section in [("", loose), *nested.items()]:
        rows = "".join(f"<tr><th>{_e(k)}</th><td>{_e(_value(v))}</td></tr>" for k, v in section.items())
        if rows:
            tables.append(f"<table><caption>{_e(name)}</caption>{rows}</table>")
    return f"<details open><summary>{_e(title)}</summary><div class=tables>{''.join(tables)}</div></details>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _e(value: Any) -> str:
    """Samples and configs are other people's text: nothing of it becomes markup."""
    return html.escape(str(value), quote=True)


def _median(logs: Logs, name: str) -> float | None:
    curve = _metric(logs.train, name, time=True)
    return statistics.median(curve.y) if curve else None


def _tokens(logs: Logs) -> float | None:
    train = logs.config.get("train", {})
    if not logs.train or not {"batch_size", "seq_len"} <= train.keys():
        return None
    return logs.train[-1]["step"] * train["batch_size"] * train["seq_len"]


def _elapsed(logs: Logs) -> float:
    """Seconds over all sittings: `elapsed_s` starts anew whenever a run is continued."""
    total = last = 0.0
    for line in logs.train:
        now = float(line.get("time", {}).get("elapsed_s") or last)
        total, last = (total + last, now) if now < last else (total, now)
    return total + last


def _count(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { --ink: #1b1f24; --soft: #626c76; --grid: #d9dde1; --raw: #9db9d6; --line: #1f6fb2; --best: #c2571a;
  --paper: #fff; --card: #f6f7f8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #98a2ad; --grid: #343b43; --raw: #3d5a78;
  --line: #6bb0ee; --best: #f0935a; --paper: #15181c; --card: #1e2227; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; font-weight: 600; }
header p { margin: .2rem 0 0; color: var(--soft); }
h2, details > summary { margin: 2.4rem 0 .8rem; font-size: 1.1rem; font-weight: 600; }
h2 small, dd small, td small { color: var(--soft); font-size: .85rem; font-weight: 400; }
.summary { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1px; margin: 1.8rem 0 0;
  border-block: 1px solid var(--grid); }
.summary div { padding: .7rem 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.4rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
.bars { width: 100%; max-width: 640px; }
.bars td:nth-child(2) { width: 70%; }
.bars i { display: block; height: .8rem; border-radius: 2px; background: var(--raw); }
.bars i.own { background: var(--best); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem; margin-bottom: 1rem; }
h3 { margin: 0 0 .3rem; color: var(--soft); font-size: .85rem; font-weight: 400; }
pre { margin: 0; padding: .8rem 1rem; background: var(--card); border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
pre b { color: var(--best); font-weight: 400; }
summary { cursor: pointer; }
.tables { columns: 2 380px; column-gap: 2.5rem; }
table { border-collapse: collapse; width: 100%; margin-bottom: 1.2rem; break-inside: avoid; font-size: .9rem; }
caption { padding: .2rem 0; text-align: left; font-weight: 600; }
th, td { padding: .22rem .6rem .22rem 0; border-top: 1px solid var(--grid); text-align: left; vertical-align: top;
  font-weight: 400; overflow-wrap: anywhere; }
th { color: var(--soft); width: 40%; }
.gain th { width: 18%; } .bars th { width: 18%; } .bars td, .bars th { border: 0; vertical-align: middle; }
td { font-variant-numeric: tabular-nums; }
</style></head>
<body>
@BODY@
</body></html>
"""
