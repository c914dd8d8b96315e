"""Makes what a page is sent of a run: all of it at first, and then what is new since a cursor."""

import json
import threading
from typing import Any, BinaryIO

from jaxlm.training import run_logs
from jaxlm.training.board import panels, sections, status
from jaxlm.training.log_table import Table, bucket_size

SAMPLED = 1000
"""Lines from which the curves of a long log are drawn until it is read."""


class View:
    """A View is a run that is followed, with what was sent of it."""

    def __init__(self, id: str, inode: int, tail: run_logs.Tail, faults: list[str]) -> None:
        self.id, self.inode, self.tail, self.lock = id, inode, tail, threading.Lock()
        self._faults = faults
        self._sections: dict[str, tuple[str, int]] = {}
        """The text of each section when it was made last, and how many bytes had been read when it became so."""
        self._made = -1

    @property
    def numbers(self) -> int:
        """Returns how many numbers it holds."""
        logs = self.tail.logs
        return sum(table.rows * (len(table.columns) + len(table.axes)) for table in (logs.train, logs.valid_table))

    def since(self, cursor: str, size: int, now: float, stalled: float = 0.0) -> dict[str, Any]:
        """Returns the view as values that JSON has: of points and sections those that are new since the cursor, all of
        them where `reset` is true. `size`: bytes of the log by now."""
        logs, tail = self.tail.logs, self.tail
        generation, train, valid, read = _parsed(cursor)
        reset = generation != self.inode or train > logs.train.rows or valid > logs.valid_table.rows or read > tail.read
        if reset:
            train = valid = 0
            read = -1
        brief = status.brief(logs, now, stalled)
        brief["alerts"] = [*self._faults, *tail.faults, *brief["alerts"]]
        out = {
            "id": self.id, "kind": "run", "reset": reset, "brief": brief,
            "cursor": f"{self.inode}.{logs.train.rows}.{logs.valid_table.rows}.{tail.read}",
            "whole": tail.read / max(1, size),
            "train": _new_buckets(logs.train, train), "valid": _new_buckets(logs.valid_table, valid),
        }  # fmt: skip
        if read != tail.read:
            out |= self._new_sections(read)
        return out

    @property
    def early_cursor(self) -> str:
        """Returns the cursor of who knows a few lines of the log."""
        return f"{self.inode}.early"

    def needs_all(self, cursor: str) -> bool:
        """Returns whether who has this cursor knows nothing of the run as it is now."""
        return _parsed(cursor)[0] != self.inode

    def early(self, file: BinaryIO, cursor: str, size: int, now: float, stalled: float = 0.0) -> dict[str, Any]:
        """Returns the view of a log that isn't read yet: at first its curves from lines here and there, and then only
        how much is read."""
        known = self.early_cursor
        out: dict[str, Any] = {"id": self.id, "kind": "run", "reset": cursor != known, "cursor": known,
                               "whole": self.tail.read / max(1, size)}  # fmt: skip
        logs = run_logs.sampled(file, size, self.tail.path, self.tail.logs, 0 if cursor == known else SAMPLED)
        out["brief"] = status.brief(logs, now, stalled)
        if cursor == known:
            return out
        shown = [panel | {"best": None} for panel in panels.panels(logs)]
        tables = {"train": _new_buckets(logs.train, 0), "valid": _new_buckets(logs.valid_table, 0)}
        return out | tables | {"panels": shown, "order": [], "sections": [], "config": flat(logs.config)}

    def _new_sections(self, read: int) -> dict[str, Any]:
        logs = self.tail.logs
        made = {one["id"]: one for one in (sections.sections(logs) if logs.train.rows or logs.valid else [])}
        for id, one in made.items():
            text = json.dumps(one)
            if self._sections.get(id, ("",))[0] != text:
                self._sections[id] = text, self.tail.read
        self._sections = {id: self._sections[id] for id in made}
        return {
            "panels": panels.panels(logs), "order": list(made),
            "sections": [one for id, one in made.items() if self._sections[id][1] > read],
            "config": flat(logs.config) if read < 0 else None,
        }  # fmt: skip

    def zoom(self, axis: str, low: float, high: float) -> dict[str, Any]:
        """Returns the points of a range, as finely as there are any."""
        out = {}
        for name, table in (("train", self.tail.logs.train), ("valid", self.tail.logs.valid_table)):
            first, last = table.find(axis, low, high)
            size = bucket_size(last - first)
            out[name] = {"size": size, "first": 0, **table.buckets(first, last, size)}
        return out


def _new_buckets(table: Table, known: int) -> dict[str, Any]:
    """Returns the buckets of a table that are new to who knows its first rows. `first`: the number of the first of
    them; those after it are to be replaced."""
    size = bucket_size(table.rows)
    first = known // size if bucket_size(known) == size else 0
    return {"size": size, "first": first, **table.buckets(first * size, table.rows, size)}


def _parsed(cursor: str) -> tuple[int, int, int, int]:
    """Returns the numbers of a cursor; one that isn't ours knows nothing."""
    parts = cursor.split(".")
    if len(parts) != 4 or not all(part.isdecimal() and len(part) <= 20 for part in parts):
        return -1, 0, 0, -1
    generation, train, valid, read = map(int, parts)
    return generation, train, valid, read


def whole(logs: run_logs.Logs) -> dict[str, Any]:
    """Returns all of a run that was read, as `View.since` does at first. It says the same whenever it is made: how the
    run was when its last line was written."""
    brief = status.brief(logs, status.updated(logs)) | {"updated": 0.0}
    if brief["state"] == "running":
        brief["state"] = "unfinished"
    made = sections.sections(logs)
    return {
        "id": logs.name, "kind": "run", "reset": True, "cursor": "", "whole": 1.0, "brief": brief,
        "train": _new_buckets(logs.train, 0), "valid": _new_buckets(logs.valid_table, 0),
        "panels": panels.panels(logs), "config": flat(logs.config),
        "sections": made, "order": [one["id"] for one in made],
    }  # fmt: skip


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested values by their dotted names, as text."""
    out: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return out
