"""Writes a run's page: its figures, curves, samples, configuration and environment as HTML that stands by itself."""

import html
import json
import math
import statistics
from collections.abc import Iterable
from typing import Any

from jaxlm.training.run_logs import Logs, advice, gain, metric, results, role


def page(logs: Logs, charts: list[str]) -> str:
    """Returns the page of a run with these charts (SVG)."""
    family = logs.config.get("model", {}).get("family")
    devices = logs.environment.get("devices", {})
    device = f"{devices.get('count')} × {devices.get('kind')}" if devices else None
    subtitle = " · ".join(str(x) for x in (family, logs.config.get("objective", {}).get("family"), device) if x)
    body = [
        f"<header><h1>{_text(logs.name)}</h1><p>{_text(subtitle)}</p></header>",
        _summary(logs),
        warnings(logs.events.get("warnings", {}).get("lines", ())),
        _results(logs),
        _before_and_after(logs),
        _classes(logs),
        _compression(logs),
        "<h2>Curves</h2><div class=charts>" + "".join(f"<figure>{chart}</figure>" for chart in charts) + "</div>",
        _samples(logs.samples),
        _sections("Config", logs.config),
        _sections("Environment", logs.environment),
    ]
    return PAGE.replace("@TITLE@", _text(logs.name)).replace("@BODY@", "\n".join(filter(None, body)))


def _summary(logs: Logs) -> str:
    """Shows the figures that one asks for first; those that the logs don't have are left out."""
    rows: list[tuple[str, str]] = []
    for name, title in (("bits_per_byte", "bits per byte"), ("loss", "validation loss")):
        curve = metric(logs.valid, name)
        finite = [(y, x) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)] if curve else []
        if curve and finite:
            best, step = min(finite)
            rows += [(f"Best {title}", f"{best:.4f} <small>step {step}</small>")]
            rows += [(f"Final {title}", f"{curve.y[-1]:.4f}")]
    if moved := metric(logs.valid, "kl_before"):
        rows += [("KL from the model before", f"{moved.y[-1]:.4f} <small>nats on new inputs</small>")]
    typical, tokens = _median(logs, "tokens_per_s"), _tokens(logs)
    model = logs.events.get("model", {})
    rows += [("Steps", f"{max(line['step'] for line in [*logs.train, *logs.valid]):,}")]
    rows += [("Tokens", _count(tokens))] if tokens else []
    rows += [("Time", _duration(seconds))] if (seconds := _elapsed(logs)) else []
    if tokens and seconds and typical:  # the whole time has validations, samples and compilations in it
        rows += [("Tokens per second", f"{tokens / seconds:,.0f} <small>a typical step {typical:,.0f}</small>")]
    mfu = [(_median(logs, f"mfu_{way}"), way) for way in ("causal", "full")]
    rows += [(f"MFU, {way} attention", f"{value:.1%}") for value, way in mfu if value]
    parameters, trainable = (model.get(key) for key in ("parameters", "trainable"))
    rows += [("Parameters", _count(parameters))] if parameters else []
    rows += [("Trainable parameters", _count(trainable))] if trainable and trainable != parameters else []
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f"<dl class=summary>{cells}</dl>"


def warnings(lines: Iterable[str]) -> str:
    """Shows lines of warning."""
    return "".join(f"<p class=warning>Warning: {_text(line)}.</p>" for line in lines)


def _results(logs: Logs) -> str:
    """Shows the run's figures, and which rows they are of: those that chose its checkpoint, or those never seen."""
    found = results(logs)
    names = list(dict.fromkeys(name for result in found for name in result.figures))
    if not names:
        return ""
    rows = []
    for result in found:
        rows_were = f"{_text(result.part)} <small>{_text(result.role)}</small>"
        cells = [_within(result.figures[n], result.intervals.get(n)) if n in result.figures else "" for n in names]
        rows.append(f"<tr><th>{rows_were}</th>{''.join(f'<td>{c}</td>' for c in (*cells, _text(result.over)))}</tr>")
    heads = "".join(f"<td>{_text(head)}</td>" for head in (*names, "over"))
    note = f"<p>{_text(advice(found))}</p>" if advice(found) else ""
    table = f"<table class=gain><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
    return f"<h2>Result <small>of the checkpoint in use, with 95 % intervals</small></h2>{table}{note}"


def _before_and_after(logs: Logs) -> str:
    """Compares the step that the run uses with the model it started from."""
    change = gain(logs)
    if change is None:
        return ""
    rows = []
    for name, figure in change["figures"].items():
        cells = [
            _within(figure["against"], figure["against_interval"]),
            _within(figure["value"], figure["interval"]),
            _within(figure["difference"], figure["difference_interval"], "+"),
            "too few" if figure["p"] is None else f"{figure['p']:.4f}",
            _text(figure["over"]),
        ]
        rows.append(f"<tr><th>{_text(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = "".join(f"<td>{head}</td>" for head in ("before", "after", "difference", "p", "over"))
    note = f"{_before(logs)} and step {change['step']}; 95 % intervals, paired bootstrap"
    if role(logs, "valid").startswith("chose the checkpoint"):
        note += "; the step was chosen on these very examples, which flatters it"
    table = f"<table class=gain><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
    return f"<h2>Before and after <small>{note}</small></h2>{table}"


def _before(logs: Logs) -> str:
    """Returns the name of the model that a run starts from, and whether its head was new, and knew nothing, then."""
    new = logs.events.get("start", {}).get("new_head")
    return _text(logs.config.get("start") or "its start") + (" with a new head" if new else "")


def _classes(logs: Logs) -> str:
    """Compares each class of the task before training and after it."""
    change = gain(logs)
    if change is None or not change.get("classes"):
        return ""
    names = ("precision", "recall", "f1")
    new = " (new head)" if logs.events.get("start", {}).get("new_head") else ""
    heads = "".join(f"<td>{name} {when}</td>" for name in names for when in (f"before{new}", "after"))
    rows = []
    for name, figures in change["classes"].items():
        cells = [_within(figures[n][value], figures[n][ends]) for n in names
                 for value, ends in (("against", "against_interval"), ("value", "interval"))]  # fmt: skip
        cells = [*cells, f"{figures['support']:g}"]
        rows.append(f"<tr><th>{_text(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    note = f"{_before(logs)} and step {change['step']}; 95 % intervals, {change['class_resamples']:,} resamples"
    table = f"<table class=gain><tr><th></th>{heads}<td>support</td></tr>{''.join(rows)}</table>"
    return f"<h2>Classes, before and after <small>{note}</small></h2>{table}"


def _within(value: Any, ends: list | None, sign: str = "") -> str:
    """Formats a value and its interval, if there is one. Numbers like NaN come as text."""
    shown = [f"{x:{sign}.4g}" if isinstance(x, int | float) else _text(x) for x in (value, *(ends or ()))]
    return f"{shown[0]} <small>{shown[1]} … {shown[2]}</small>" if ends else shown[0]


def _compression(logs: Logs) -> str:
    """Compares the model with general compressors, in bits per byte of the same text."""
    event = logs.events.get("compression")
    if event is None:
        return ""
    sizes = {k: float(v) for k, v in event.items() if k in ("gzip", "xz", "model")}
    curve = metric(logs.valid, "bits_per_byte")
    if curve and "model" not in sizes and any(map(math.isfinite, curve.y)):
        sizes["this model"] = min(filter(math.isfinite, curve.y))
    widest = max(sizes.values(), default=1.0)
    bars = "".join(
        f"<tr><th>{_text(name)}</th><td><i style='width:{100 * size / widest:.1f}%'"
        f"{' class=own' if 'model' in name else ''}></i></td><td>{size:.3f}</td></tr>"
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
    )
    return f"<h2>Compression <small>bits per byte of the validation text</small></h2><table class=bars>{bars}</table>"


def _samples(samples: list[dict]) -> str:
    """Shows the first and the last text for each prompt, side by side."""
    prompts: dict[str, list[dict]] = {}
    for line in samples:
        prompts.setdefault(line["prompt"], []).append(line)
    if not prompts:
        return ""
    pairs = []
    for lines in prompts.values():
        shown = [lines[0]] if len(lines) == 1 else [lines[0], lines[-1]]
        cells = "".join(f"<div><h3>step {_text(line['step'])}</h3><pre>{_shown(line)}</pre></div>" for line in shown)
        pairs.append(f"<div class=pair>{cells}</div>")
    return "<h2>Samples <small>first and last</small></h2>" + "".join(pairs)


def _shown(line: dict) -> str:
    before = "" if line.get("goes_on", True) else "\n→ "
    return f"<b>{_text(line['prompt'])}</b>{before}{_text(line['text'])}"


def _sections(title: str, values: dict[str, Any]) -> str:
    """Shows nested values as one table for each section; values without a section come first."""
    if not values:
        return ""
    plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
    nested = {k: v for k, v in values.items() if isinstance(v, dict) and v}
    tables = []
    for name, section in [("", plain), *nested.items()]:
        rows = "".join(f"<tr><th>{_text(k)}</th><td>{_text(_value(v))}</td></tr>" for k, v in section.items())
        if rows:
            tables.append(f"<table><caption>{_text(name)}</caption>{rows}</table>")
    return f"<details open><summary>{_text(title)}</summary><div class=tables>{''.join(tables)}</div></details>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    """Returns a value as text without markup. Samples and configs are other people's text: nothing of it may become
    markup."""
    return html.escape(str(value), quote=True)


def _median(logs: Logs, name: str) -> float | None:
    curve = metric(logs.train, name, time=True)
    return statistics.median(curve.y) if curve else None


def _tokens(logs: Logs) -> float | None:
    return logs.train[-1].get("tokens") if logs.train else None


def _elapsed(logs: Logs) -> float:
    """Returns seconds over all sittings: `elapsed_s` starts anew whenever a run is continued."""
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
.warning { margin: 1rem 0; padding-left: .8rem; border-left: 3px solid var(--best); }
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
.gain th { width: 18%; } .matrix { width: auto; } .matrix th, .matrix td { width: auto; padding: .3rem .9rem; }
.bars th { width: 18%; } .bars td, .bars th { border: 0; vertical-align: middle; }
td { font-variant-numeric: tabular-nums; }
</style></head>
<body>
@BODY@
</body></html>
"""
