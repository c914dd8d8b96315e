"""Reads what the logs of a run say: its lines, curves and gains."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.training.log import read_lines


@dataclass(frozen=True)
class Logs:
    """A Logs holds what a run directory says."""

    name: str
    train: list[dict]
    valid: list[dict]
    samples: list[dict]
    events: dict[str, dict]
    """The last event of each name."""
    config: dict[str, Any]
    environment: dict[str, Any]
    gains: list[dict]
    """Comparisons of validations with that before the first step, of a run that starts from a model."""
    tests: list[dict]
    """Scores on the test data, one for each end of the run."""


def read(folder: Path) -> Logs:
    """Reads the logs of a run directory. Raises ValueError where there are none, or nothing to show yet."""
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
    gains, tests = ([line for line in kinds["event"] if line.get("name") == name] for name in ("gain", "test"))
    return Logs(name, kinds["train"], kinds["valid"], kinds["sample"], events, config, environment, gains, tests)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def gain(logs: Logs) -> dict | None:
    """Returns what the run's step changed that is used: while it is trained the best one's gain where the run uses the
    best, else the last one's; or None."""
    used = logs.events.get("end", {}).get("used")
    if exact := [line for line in logs.gains if line["step"] == used]:
        return exact[-1]
    best = [line for line in logs.gains if line.get("best")]
    gains = best if best and logs.config.get("train", {}).get("use") == "best" else logs.gains
    return gains[-1] if gains else None


def role(logs: Logs, part: str) -> str:
    """Returns what the rows of a part, valid or test, were to the run: whether they chose its checkpoint."""
    if part == "test":
        n = len(logs.tests)
        return "never seen" + (f"; scored {n} times, as the run was given more steps after its end" if n > 1 else "")
    train, end = logs.config.get("train", {}), logs.events.get("end", {})
    steps = {line["step"] for line in logs.valid} - {0}
    if train.get("use") == "best" and len(steps) > 1:
        chosen = f": step {end['used']}" if "used" in end else ""
        return f"chose the checkpoint{chosen} by the best {train.get('metric')} of {len(steps)} validations"
    if end.get("reason") == "stopped early":
        return f"chose the checkpoint: training stopped at step {end['step']}, for they got no better"
    return "held out, and chose nothing"


@dataclass(frozen=True)
class Result:
    """A Result holds a run's figures on the rows of a part, at the step that the run uses."""

    part: str
    role: str
    figures: dict[str, Any]
    intervals: dict[str, Any]
    """The ends of the 95 % intervals that are known."""
    over: str
    """How many examples or documents; empty: not known."""


def results(logs: Logs) -> list[Result]:
    """Returns the figures of a run that has ended: on its validation rows and, if it has some, on its test rows."""
    end = logs.events.get("end")
    if end is None or not logs.valid:
        return []
    used = end.get("used", end["step"])
    line = next((line for line in reversed(logs.valid) if line["step"] == used), logs.valid[-1])
    known: dict[str, Any] = next((x["figures"] for x in logs.gains if x["step"] == used), {})
    test = logs.tests[-1] if logs.tests else None
    own = logs.config.get("train", {}).get("metric", "loss").rpartition(":")[2]
    names = test["figures"] if test else known or (own, "loss", "bits_per_byte")
    names = [name for name in dict.fromkeys(names) if name in line]
    found = Result("valid", role(logs, "valid"), {n: line[n] for n in names},
                   {n: known[n]["interval"] for n in names if n in known},
                   known[names[0]]["over"] if names and names[0] in known else "")  # fmt: skip
    if test is None:
        return [found]
    return [found, Result("test", role(logs, "test"), test["figures"], test["intervals"], test["over"])]


def said(result: Result) -> str:
    """Returns a result as a line of text."""

    def value(name: str, x: Any) -> str:
        ends = result.intervals.get(name)
        shown = f" [{', '.join(_number(e) for e in ends)}]" if ends else ""
        return f"{name} {_number(x)}{shown}"

    over = f", {result.over}" if result.over else ""
    figures = ", ".join(value(name, x) for name, x in result.figures.items())
    return f"{result.part} ({result.role}{over}): {figures}"


def advice(found: list[Result]) -> str:
    """Returns what to do about scores on rows that chose the checkpoint, if there are no others; empty: nothing."""
    if len(found) == 1 and found[0].role.startswith("chose the checkpoint"):
        return "scores on rows that chose the checkpoint flatter it; name rows that were never seen as data.test"
    return ""


def _number(x: Any) -> str:
    return f"{x:.4g}" if isinstance(x, int | float) else str(x)


@dataclass(frozen=True)
class Curve:
    """A Curve holds the values of a figure by step."""

    x: list[int]
    y: list[float]


def metric(lines: list[dict], name: str, *, time: bool = False) -> Curve | None:
    """Returns the values of a figure by step, or None if there are none; "NaN" and its kin become gaps."""
    values = [(line["step"], (line.get("time", {}) if time else line).get(name)) for line in lines]
    known = [(step, float(value)) for step, value in values if isinstance(value, int | float | str)]
    return Curve([step for step, _ in known], [value for _, value in known]) if known else None
