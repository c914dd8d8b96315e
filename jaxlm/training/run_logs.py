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
    gains = [line for line in kinds["event"] if line.get("name") == "gain"]
    return Logs(name, kinds["train"], kinds["valid"], kinds["sample"], events, config, environment, gains)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def gain(logs: Logs) -> dict | None:
    """Returns what the run's step changed that is used: the best one's gain where the run uses the best, else the last
    one's; or None."""
    best = [line for line in logs.gains if line.get("best")]
    gains = best if best and logs.config.get("train", {}).get("use") == "best" else logs.gains
    return gains[-1] if gains else None


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
