"""Reads what the logs of a run say, from the beginning or as they grow: lines, curves, gains and results."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from jaxlm.training.log import read_line
from jaxlm.training.log_table import Table

CHUNK = 1 << 20
"""Bytes that are read at once of a log that grows."""
SAMPLED_LINE, SAMPLED_END = 1 << 12, 1 << 16
"""Bytes in which a line of a long log is looked for, and of its end."""


@dataclass
class Logs:
    """A Logs holds what a run directory says."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    train: Table = field(default_factory=Table)
    valid_table: Table = field(default_factory=Table)
    valid: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    events: dict[str, dict] = field(default_factory=dict)
    """The last event of each name."""
    gains: list[dict] = field(default_factory=list)
    """Comparisons of validations with that before the first step, of a run that starts from a model."""
    tests: list[dict] = field(default_factory=list)
    """Scores on the test data, one for each end of the run."""
    answers: list[dict] = field(default_factory=list)
    """What a labelled task's predictions were: classes, confusions, the hardest wrong ones."""
    last: dict = field(default_factory=dict)
    """The newest line."""
    times: list[float] = field(default_factory=list)
    """When the newest lines were written, in seconds since 1970."""
    _elapsed: tuple[float, float] = (0.0, 0.0)

    def add(self, line: dict) -> None:
        """Takes a line of the log."""
        kind = line["kind"]
        if kind == "train":
            self.train.add(line, self._axes(line))
        elif kind == "valid":
            self.valid.append(line)
            self.valid_table.add(line, self._axes(line))
        elif kind == "sample":
            self.samples.append(line)
        elif kind == "event":
            name = line.get("name", "")
            self.events[name] = line
            kept = {"gain": self.gains, "test": self.tests, "answers": self.answers}.get(name)
            if kept is not None:
                kept.append(line)
        self.last = line
        if isinstance(unix := line.get("time", {}).get("unix"), int | float):
            self.times = [*self.times[-31:], unix]

    def _axes(self, line: dict) -> dict[str, float]:
        """Returns where a line stands on each axis. Seconds add up over all sittings, for `elapsed_s` starts anew
        whenever a run is continued; a validation stands where the training step before it does."""
        before, last = self._elapsed
        now = line.get("time", {}).get("elapsed_s") if line["kind"] == "train" else None
        now = float(now) if isinstance(now, int | float) else last
        self._elapsed = before, last = (before + last, now) if now < last else (before, now)
        tokens = line.get("tokens") if line["kind"] == "train" else self.train.last("tokens")
        return {"step": line["step"], "tokens": tokens or 0.0, "seconds": before + last}

    @property
    def seconds(self) -> float:
        """Returns the seconds of training over all sittings."""
        return sum(self._elapsed)

    @property
    def step(self) -> int:
        """Returns the last step that was trained or validated."""
        return max((int(table.axes["step"][-1]) for table in (self.train, self.valid_table) if table.rows), default=0)


def read(folder: Path) -> Logs:
    """Reads the logs of a run directory. Raises ValueError where there are none, or nothing to show yet."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no metrics.jsonl: name the directory of a run")
    logs = begin(folder)
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if text.endswith(b"\n"):
                logs.add(read_line(text, path, number))
    if not logs.train.rows and not logs.valid:
        raise ValueError(f"{path} holds no training or validation line yet")
    return logs


def begin(folder: Path) -> Logs:
    """Returns the logs of a run directory before any line is read. ValueError: a file of it is not JSON."""
    config, environment = (read_json(folder / name) for name in ("config.json", "environment.json"))
    return Logs(str(config.get("name") or folder.resolve().name), config, environment)


def read_json(path: Path) -> dict[str, Any]:
    """Returns what a file of a run directory holds, nothing if it isn't there. ValueError: it is not JSON."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


class Tail:
    """A Tail reads a log that grows, each line once. A line that is no line of a log is told and left out."""

    def __init__(self, path: Path, logs: Logs, start: int = 0) -> None:
        """`start`: bytes that are left out, and with them the rest of the line in which they end."""
        self.path, self.logs = path, logs
        self.read, self.lines = start, 0
        """Bytes and lines that were read."""
        self.faults: list[str] = []
        self._rest, self._cut = b"", start > 0

    def advance(self, file: BinaryIO) -> bool:
        """Reads some bytes of the log on; returns whether there were any."""
        file.seek(self.read)
        text = file.read(CHUNK)
        self.read += len(text)
        *whole, self._rest = (self._rest + text).split(b"\n")
        if self._cut and whole:
            del whole[0]
            self._cut = False
        for one in whole:
            self.lines += 1
            try:
                self.logs.add(read_line(one, self.path, self.lines))
            except ValueError as error:
                self.faults = [*self.faults[:4], str(error)]
        return bool(text)


def sampled(file: BinaryIO, size: int, path: Path, about: Logs, lines: int) -> Logs:
    """Returns what lines here and there say of a long log, and all of its end: curves are coarse, and its last line is
    the last. `about` has the run's configuration."""
    logs = Logs(about.name, about.config, about.environment)
    end = max(0, size - SAMPLED_END)
    for i in range(lines):
        file.seek(end * i // lines)
        _, *whole = file.read(SAMPLED_LINE).split(b"\n")
        if len(whole) < 2:  # in the midst of a line that is longer than most
            continue
        try:
            logs.add(read_line(whole[0], path, 0))
        except ValueError:  # it is told when the whole log is read, which goes on
            continue
    tail = Tail(path, logs, end)
    while tail.advance(file):
        pass
    return logs


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
