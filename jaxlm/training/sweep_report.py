"""Puts a sweep on one page and in a table, from its results alone."""

from collections.abc import Iterable
from typing import Any

from jaxlm.training import sweep_charts as charts
from jaxlm.training.sweep_charts import shown, text

PAGE_NAME = "report.html"


def table(results: dict[str, Any], most: int = 15) -> str:
    """Returns the best trials and the counts as text."""
    paths, metric = list(results["space"]), results["metric"]
    ranked = [t for t in results["trials"] if t["state"] == "complete"]
    ranked.sort(key=lambda t: (t["value"] if results["lower"] else -t["value"], t["number"]))
    heads = ["trial", metric, *(["95 % over seeds"] if len(results["seeds"]) > 1 else []), *paths]
    rows = [[str(t["number"]), *_value(t, results), *(shown(t["params"][path]) for path in paths)]
            for t in ranked[:most]]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    if len(ranked) > most:
        lines.append(f"… and {len(ranked) - most} more")
    lines += ["", said(results)]
    if shares := results["importances"]:
        each = ", ".join(f"{path} {share:.0%}" for path, share in sorted(shares.items(), key=lambda item: -item[1]))
        lines.append(f"what makes trials good: {each}")
    failed = [t for t in results["trials"] if t["state"] == "failed"]
    lines += [f"trial {t['number']} failed: {t['reason']}" for t in failed[:5]]
    return "\n".join(lines)


def said(results: dict[str, Any]) -> str:
    """Returns how many trials came to what."""
    c = results["counts"]
    words = {"complete": "complete", "pruned": "stopped early", "failed": "failed", "running": "unfinished"}
    return f"{results['total']} trials: " + ", ".join(f"{c[state]} {word}" for state, word in words.items() if c[state])


def _value(trial: dict, results: dict[str, Any]) -> list[str]:
    ends = trial["interval"]
    between = "" if ends is None else f"{ends[0]:.4g} … {ends[1]:.4g}"
    return [shown(trial["value"]), *([between] if len(results["seeds"]) > 1 else [])]


def page(results: dict[str, Any]) -> str:
    """Returns the page of a sweep, which stands by itself."""
    subtitle = " · ".join([said(results), f"{results['sampler']} and {results['pruner']}",
                           f"{len(results['seeds'])} seed{'s' * (len(results['seeds']) > 1)} a trial"])  # fmt: skip
    body = [f"<header><h1>{text(results['name'])}</h1><p>{text(subtitle)}</p></header>", _best(results)]
    if any(t["state"] != "running" for t in results["trials"]):
        figures = [
            (
                "History",
                "dashed: the best so far; hollow: stopped early, its last validation; ×: failed",
                charts.history(results),
            ),
            ("Validations", "of each trial's first seed; dashed: stopped early", charts.curves(results)),
            ("Importances", "share in what makes trials good, PED-ANOVA", charts.importances(results)),
        ]
        body += [
            _charts(_figure(*figure) for figure in figures if figure[2]),
            "<h2>By field</h2>", _charts(map(_plain, charts.slices(results))),
            "<h2>All fields <small>a line is a trial; the better, the darker</small></h2>",
            _plain(charts.parallel(results)),
        ]  # fmt: skip
    body.append(_trials(results))
    return PAGE.replace("@TITLE@", text(results["name"])).replace("@BODY@", "\n".join(body))


def _charts(figures: Iterable[str]) -> str:
    return f"<div class=charts>{''.join(figures)}</div>"


def _figure(title: str, note: str, chart: str) -> str:
    return f"<figure><figcaption>{title} <small>{note}</small></figcaption>{chart}</figure>"


def _plain(chart: str) -> str:
    return f"<figure>{chart}</figure>"


def _best(results: dict[str, Any]) -> str:
    """Shows the best trial beside the settings that the sweep's run has itself."""
    if results["best"] is None:
        return "<p>No trial is complete yet.</p>"
    trial = results["trials"][results["best"]]
    between = "" if trial["interval"] is None else " <small>{:.4g} … {:.4g}</small>".format(*trial["interval"])
    cells = [f"<div><dt>Best {text(results['metric'])}</dt><dd>{shown(trial['value'])}{between}</dd></div>"]
    for path, value in trial["params"].items():
        own = f"<small>own {text(shown(results['own'][path]))}</small>"
        cells.append(f"<div><dt>{text(path)}</dt><dd>{text(shown(value))} {own}</dd></div>")
    note = f"Trial {trial['number']}. Its configuration is best.json: jaxlm train best.json trains it anew."
    return f"<dl>{''.join(cells)}</dl><p><small>{note}</small></p>"


def _trials(results: dict[str, Any]) -> str:
    paths = list(results["space"])
    heads = ["trial", "state", results["metric"], *(["95 % over seeds"] if len(results["seeds"]) > 1 else []), *paths,
             "seconds"]  # fmt: skip
    rows = []
    for t in results["trials"]:
        state = {"pruned": f"stopped at {t['steps'][-1][0]}" if t["steps"] else "stopped",
                 "failed": f"failed: {t['reason']}"}.get(t["state"], t["state"])  # fmt: skip
        cells = [t["number"], state, *_value(t, results), *(shown(t["params"][path]) for path in paths),
                 shown(t["seconds"])]  # fmt: skip
        kind = " class=best" if t["number"] == results["best"] else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{text(cell)}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th scope=col>{text(name)}</th>" for name in heads)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h2>Trials</h2><div class=wide>{whole}</div>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { --ink: #1b1f24; --soft: #626c76; --grid: #d9dde1; --line: #1f6fb2; --best: #c2571a; --paper: #fff;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #98a2ad; --grid: #343b43; --line: #6bb0ee;
  --best: #f0935a; --paper: #15181c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; font-weight: 600; }
h2, figcaption { margin: 2.2rem 0 .6rem; font-size: 1.1rem; font-weight: 600; }
header p { margin: .2rem 0 0; color: var(--soft); }
small { color: var(--soft); font-size: .85rem; font-weight: 400; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); margin: 1.6rem 0 .6rem;
  border-block: 1px solid var(--grid); padding: .7rem 0; gap: .4rem 1rem; }
dt { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 0 2rem; }
figure { margin: 0; } figcaption { margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--soft); } svg .name { fill: var(--ink); }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.grid, .axis { stroke: var(--grid); fill: none; } .axis { stroke: var(--soft); }
.record { stroke: var(--best); fill: none; stroke-width: 1.5; stroke-dasharray: 5 3; }
.curve { fill: none; stroke: var(--line); stroke-width: 1.5; }
.curve.pruned { stroke: var(--soft); stroke-dasharray: 3 2; } .curve.best { stroke: var(--best); stroke-width: 2.5; }
circle, .bar { fill: var(--line); } circle.best { fill: var(--best); }
circle.pruned { fill: var(--paper); stroke: var(--soft); stroke-width: 1.5; }
.failed { stroke: var(--best); stroke-width: 2; fill: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-top: 1px solid var(--grid); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 400; } tr.best td { color: var(--best); font-weight: 600; }
</style></head>
<body>
@BODY@
</body></html>
"""
