"""Writes what a page says of a run beside its curves: sections of blocks, as values that JSON has.

All of them are plain text: the page makes no markup of what it is given. Kinds of blocks: `facts` (name, value, note),
`lines`, `table` (heads, rows of cells; `shade` of a cell is 0 … 1), `bars` (name, text, share, own), `samples`,
`command`, and `parts` (tables of names and values).
"""

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.training.board.status import duration
from jaxlm.training.log import shown
from jaxlm.training.run_logs import Logs, advice, gain, results, role

SAMPLES = 12
"""At most so many texts are shown of each prompt: the first, the last, and some in between."""
TYPICAL = 10_000
"""Logged steps from which a typical speed is taken."""
Section = dict[str, Any]


def sections(logs: Logs) -> list[Section]:
    """Returns the sections of a run in their order; those that its logs say nothing of are left out."""
    made = [
        _summary(logs), _notes(logs), _results(logs), _gains(logs), _classes(logs), _confusion(logs),
        _hardest(logs), _compression(logs), _samples(logs.samples), _command(logs),
        _values("config", "Config", logs.config), _values("environment", "Environment", logs.environment),
    ]  # fmt: skip
    return [section for section in made if section is not None]


def section(id: str, title: str, *blocks: Mapping[str, Any], note: str = "", folded: bool = False) -> Section:
    """Returns a section; `folded`: it can be closed."""
    return {"id": id, "title": title, "note": note, "folded": folded, "blocks": list(blocks)}


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]], wide: bool = False) -> dict[str, Any]:
    """Returns a block with a table, whose first column names the rows; `wide`: cells hold sentences."""
    return {"kind": "table", "heads": list(heads), "rows": [list(row) for row in rows], "wide": wide}


def cell(text: Any, small: Any = "", **more: Any) -> dict[str, Any]:
    """Returns a cell with something smaller beside its text."""
    return {"text": str(text), "small": str(small), **more}


def warnings(lines: Iterable[str]) -> dict[str, Any]:
    """Returns a block with lines of warning."""
    return {"kind": "lines", "lines": [f"Warning: {line}." for line in lines], "warns": True}


def _notes(logs: Logs) -> Section | None:
    lines = logs.events.get("warnings", {}).get("lines", ())
    return section("warnings", "", warnings(lines)) if lines else None


def _summary(logs: Logs) -> Section:
    """Shows the figures that one asks for first; those that the logs don't have are left out."""
    rows: list[tuple[str, str, str]] = []
    for name, title in (("bits_per_byte", "bits per byte"), ("loss", "validation loss")):
        curve = logs.valid_table.curve(name)
        finite = [(y, x) for x, y in zip(*curve, strict=True) if math.isfinite(y)] if curve else []
        if curve and finite:
            best, step = min(finite)
            rows += [(f"Best {title}", f"{best:.4f}", f"step {step}"), (f"Final {title}", f"{curve.y[-1]:.4f}", "")]
    if (moved := logs.valid_table.last("kl_before")) is not None:
        rows += [("KL from the model before", f"{moved:.4f}", "nats on new inputs")]
    tokens, typical = logs.train.last("tokens"), _median(logs, "tokens_per_s")
    rows += [("Steps", f"{logs.step:,}", "")]
    rows += [("Tokens", _count(tokens), "")] if tokens else []
    rows += [("Time", duration(logs.seconds), "")] if logs.seconds else []
    if tokens and logs.seconds and typical:  # the whole time has validations, samples and compilations in it
        rows += [("Tokens per second", f"{tokens / logs.seconds:,.0f}", f"a typical step {typical:,.0f}")]
    mfu = [(_median(logs, f"mfu_{way}"), way) for way in ("causal", "full")]
    rows += [(f"MFU, {way} attention", f"{value:.1%}", "") for value, way in mfu if value]
    model = logs.events.get("model", {})
    parameters, trainable = (model.get(key) for key in ("parameters", "trainable"))
    rows += [("Parameters", _count(parameters), "")] if parameters else []
    rows += [("Trainable parameters", _count(trainable), "")] if trainable and trainable != parameters else []
    return section("summary", "", {"kind": "facts", "rows": rows})


def _median(logs: Logs, name: str) -> float | None:
    """Returns the median of a time over the last steps."""
    values = logs.train.tail(f"time/{name}", TYPICAL)
    return float(np.median(values)) if len(values) else None


def _results(logs: Logs) -> Section | None:
    """Shows the run's figures, and which rows they are of: those that chose its checkpoint, or those never seen."""
    found = results(logs)
    names = list(dict.fromkeys(name for result in found for name in result.figures))
    if not names:
        return None
    rows = [[cell(result.part, result.role),
             *(_within(result.figures[n], result.intervals.get(n)) if n in result.figures else "" for n in names),
             result.over] for result in found]  # fmt: skip
    note = [{"kind": "lines", "lines": [advice(found)]}] if advice(found) else []
    return section("results", "Result", table(["", *names, "over"], rows), *note,
                   note="of the checkpoint in use, with 95 % intervals")  # fmt: skip


def _gains(logs: Logs) -> Section | None:
    """Compares the step that the run uses with the model it started from."""
    change = gain(logs)
    if change is None:
        return None
    rows = [
        [
            name,
            _within(figure["against"], figure["against_interval"]),
            _within(figure["value"], figure["interval"]),
            _within(figure["difference"], figure["difference_interval"], "+"),
            "too few" if figure["p"] is None else f"{figure['p']:.4f}",
            figure["over"],
        ]
        for name, figure in change["figures"].items()
    ]
    note = f"{_before(logs)} and step {change['step']}; 95 % intervals, paired bootstrap"
    if role(logs, "valid").startswith("chose the checkpoint"):
        note += "; the step was chosen on these very examples, which flatters it"
    heads = ["", "before", "after", "difference", "p", "over"]
    return section("gain", "Before and after", table(heads, rows), note=note)


def _before(logs: Logs) -> str:
    """Returns the name of the model that a run starts from, and whether its head was new, and knew nothing, then."""
    new = logs.events.get("start", {}).get("new_head")
    return str(logs.config.get("start") or "its start") + (" with a new head" if new else "")


def _answers(logs: Logs) -> dict | None:
    """Returns what the predictions were of the step that the run uses, on rows that were never seen if it has some; of
    the last validation, while it is trained."""
    used = logs.events.get("end", {}).get("used")
    tested = [line for line in logs.answers if line.get("part") == "test"]
    valid = [line for line in logs.answers if line.get("part") == "valid"]
    return next(iter(reversed(tested or [line for line in valid if line["step"] == used] or valid)), None)


def _of_answers(line: dict) -> str:
    rows = "test rows" if line["part"] == "test" else f"validation at step {line['step']}"
    return rows if line["wrong"] is None else f"{rows}; {line['wrong']:,} of {line['over']:,} wrong"


def _classes(logs: Logs) -> Section | None:
    """Shows each class of the task: before training and after it, or as the last validation has it."""
    names = ("precision", "recall", "f1")
    change, answers = gain(logs), _answers(logs)
    if change and change.get("classes"):
        new = " (new head)" if logs.events.get("start", {}).get("new_head") else ""
        heads = ["", *(f"{name} {when}" for name in names for when in (f"before{new}", "after")), "support"]
        ends = (("against", "against_interval"), ("value", "interval"))
        rows = [[name, *(_within(figures[n][value], figures[n][both]) for n in names for value, both in ends),
                 f"{figures['support']:g}"] for name, figures in change["classes"].items()]  # fmt: skip
        note = f"{_before(logs)} and step {change['step']}; 95 % intervals, {change['class_resamples']:,} resamples"
        return section("classes", "Classes, before and after", table(heads, rows), note=note)
    if not answers or not answers.get("classes"):
        return None
    rows = [[name, *(cell(f"{figures[n]:.4f}", shade=figures[n]) for n in names), f"{figures['support']:,g}"]
            for name, figures in answers["classes"].items()]  # fmt: skip
    return section("classes", "Classes", table(["", *names, "support"], rows), note=_of_answers(answers))


def _confusion(logs: Logs) -> Section | None:
    """Shows how often each class was taken for each other. A cell's shade is its share of the row."""
    answers = _answers(logs)
    if not answers or not (found := answers.get("confusion")):
        return None
    labels = found["labels"]
    rows = []
    for i, (label, counts) in enumerate(zip(labels, found["counts"], strict=True)):
        total = sum(counts) or 1
        rows.append([label, *(cell(f"{n:,}" if n else "·", shade=n / total, edge=i == j, wrong=i != j)
                              for j, n in enumerate(counts))])  # fmt: skip
    lines = ["A row is a true class, a column what was predicted; darker is a larger share of the row."]
    if found["left_out"]:
        lines += [f"{found['left_out']:,} classes with fewer mistakes are left out."]
    return section("confusion", "Confusions", table(["true ↓ predicted →", *labels], rows),
                   {"kind": "lines", "lines": lines}, note=_of_answers(answers))  # fmt: skip


def _hardest(logs: Logs) -> Section | None:
    """Shows the wrong examples that the model was surest of."""
    answers = _answers(logs)
    if not answers or not answers.get("hardest"):
        return None
    rows = [[x["where"] or "", x["text"], x["true"], x["found"], "" if x["loss"] is None else _within(x["loss"], None)]
            for x in answers["hardest"]]  # fmt: skip
    block = table(["place", "text", "true", "predicted", "loss"], rows, wide=True)
    return section("hardest", "Hardest wrong examples", block, note=_of_answers(answers))


def _within(value: Any, ends: list | None, sign: str = "") -> dict[str, Any]:
    """Formats a value and its interval, if there is one. Numbers like NaN come as text."""
    shown = [f"{x:{sign}.4g}" if isinstance(x, int | float) else str(x) for x in (value, *(ends or ()))]
    return cell(shown[0], f"{shown[1]} … {shown[2]}" if ends else "")


def _compression(logs: Logs) -> Section | None:
    """Compares the model with general compressors, in bits per byte of the same text."""
    event = logs.events.get("compression")
    if event is None:
        return None
    sizes = {k: float(v) for k, v in event.items() if k in ("gzip", "xz", "model")}
    curve = logs.valid_table.curve("bits_per_byte")
    if curve and "model" not in sizes and any(map(math.isfinite, curve.y)):
        sizes["this model"] = min(filter(math.isfinite, curve.y))
    widest = max(sizes.values(), default=1.0)
    rows = [[name, f"{size:.3f}", size / widest, "model" in name]
            for name, size in sorted(sizes.items(), key=lambda item: -item[1])]  # fmt: skip
    return section("compression", "Compression", {"kind": "bars", "rows": rows},
                   note="bits per byte of the validation text")  # fmt: skip


def _samples(samples: list[dict]) -> Section | None:
    """Shows the first and the last text for each prompt, side by side; others can be chosen."""
    prompts: dict[str, list[dict]] = {}
    for line in samples:
        prompts.setdefault(line["prompt"], []).append(line)
    if not prompts:
        return None
    rows = []
    for prompt, lines in prompts.items():
        chosen = sorted({round(i) for i in np.linspace(0, len(lines) - 1, SAMPLES)})
        rows.append({"prompt": prompt, "texts": [[lines[i]["step"], after_prompt(lines[i])] for i in chosen]})
    return section("samples", "Samples", {"kind": "samples", "rows": rows}, note="first and last")


def after_prompt(line: dict) -> str:
    """Returns what a model wrote, on a line of its own where it doesn't go on from its prompt."""
    return shown("", line["text"], line.get("goes_on", True))


def _command(logs: Logs) -> Section | None:
    """Says by which command a run of the same configuration is trained, and with which versions this one was."""
    out, name = logs.config.get("out"), logs.config.get("name")
    if not out or not name:
        return None
    file = Path(str(out)) / str(name) / "config.json"
    versions = logs.environment.get("versions", {})
    git = logs.environment.get("git") or {}
    with_ = [f"{key} {versions[key]}" for key in ("python", "jaxlm", "jax") if versions.get(key)]
    with_ += [f"commit {git['commit'][:10]}{' with changes' if git.get('dirty') else ''}"] if git.get("commit") else []
    command = f"jaxlm train {shlex.quote(str(file))} --name {shlex.quote(f'{name}-again')}"
    return section("command", "The same run again", {"kind": "command", "text": command}, note=", ".join(with_))


def _values(id: str, title: str, values: dict[str, Any]) -> Section | None:
    """Shows nested values as one table for each part; values without a part come first."""
    plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
    nested = {k: v for k, v in values.items() if isinstance(v, dict) and v}
    parts = [{"caption": name, "rows": [[k, _value(v)] for k, v in part.items()]}
             for name, part in [("", plain), *nested.items()] if part]  # fmt: skip
    return section(id, title, {"kind": "parts", "parts": parts}, folded=True) if parts else None


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:g}"
