"""Finds the runs below a folder and follows their logs, without writing anything and without leaving the folder."""

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from jaxlm.training import run_logs, stream_report
from jaxlm.training.board import status
from jaxlm.training.board.views import View

LOG, STREAM = "metrics.jsonl", "results.json"
NOT_ENTERED = {"checkpoints", "events", "tokenizer", "base", "memory", "node_modules", "__pycache__"}
DEPTH, MOST_RUNS = 6, 2000
TAIL_BYTES = 1 << 16
"""How much of the end of a log says how its run is doing."""
OLD = 1.5
"""Seconds after which a folder is looked at anew."""
MOST_NUMBERS = 40_000_000
"""Numbers that are kept of logs that are followed, 320 MB. The log that nobody asked for longest is let go first."""
EARLY_BYTES = 1 << 21
"""A log of which more is unread is shown from lines here and there until it is read."""
TURN = 0.25
"""Seconds for which a request reads a log on, so that the first points of a long one come at once."""


class Runs:
    """The runs of a folder. Its methods may be called by several threads."""

    def __init__(self, root: Path, stalled: float = 0.0, now: Callable[[], float] = time.time) -> None:
        """`root` need not be there yet. `stalled`: seconds without a line after which a run has stalled; 0: by its own
        pace."""
        self.root, self._stalled, self._now = root.resolve(), stalled, now
        self._lock = threading.Lock()
        self._found: tuple[float, dict[str, Path]] = (-OLD, {})
        self._briefs: dict[str, tuple[tuple, run_logs.Logs]] = {}
        self._views: dict[str, View] = {}

    def folders(self) -> dict[str, Path]:
        """Returns the folders of runs and streams by their path below the root, which is how they are called. Folders
        that are symbolic links are not entered."""
        with self._lock:
            if time.monotonic() - self._found[0] > OLD:
                found: dict[str, Path] = {}
                self._search(self.root, 0, found)
                self._found = time.monotonic(), found
            return self._found[1]

    def _search(self, folder: Path, depth: int, found: dict[str, Path]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # it went away, or isn't ours to read: then there is nothing to show of it
            return
        names = {entry.name for entry in entries}
        if names & {LOG, STREAM}:
            found[folder.relative_to(self.root).as_posix() if depth else self.root.name] = folder
        if LOG in names or depth == DEPTH:
            return
        for entry in entries:
            if len(found) < MOST_RUNS and entry.is_dir(follow_symlinks=False) and not (
                entry.name in NOT_ENTERED or entry.name.startswith(".")
            ):  # fmt: skip
                self._search(Path(entry.path), depth + 1, found)

    def open(self, folder: Path, name: str) -> BinaryIO | None:
        """Opens a file of a run; None: there is none, or it is no plain file inside the root."""
        path = folder / name
        if not Path(os.path.realpath(folder)).is_relative_to(self.root):
            return None
        try:
            number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            return None
        return os.fdopen(number, "rb")

    def json(self, folder: Path, name: str) -> tuple[dict[str, Any], str]:
        """Returns what a file of a run holds, nothing if there is none, and what is wrong with it."""
        file = self.open(folder, name)
        if file is None:
            return {}, ""
        with file:
            try:
                values = json.load(file)
            except ValueError as error:
                return {}, f"{name} is not JSON: {error}"
        return (values, "") if isinstance(values, dict) else ({}, f"{name} is no mapping")

    def logs(self, folder: Path) -> tuple[run_logs.Logs, list[str]]:
        """Returns the logs of a run before any line is read, and what is wrong with its files."""
        (config, fault), (environment, other) = self.json(folder, "config.json"), self.json(folder, "environment.json")
        logs = run_logs.Logs(str(config.get("name") or folder.name), config, environment)
        return logs, list(filter(None, (fault, other)))

    def list(self) -> list[dict[str, Any]]:
        """Returns what a list says of each run, from the end of its log alone: those that train by their names, then
        the newest first."""
        out = []
        for id, folder in self.folders().items():
            if (made := self._brief(id, folder)) is not None:
                out.append({"id": id} | made)
        trains = lambda brief: brief["state"] == "running"  # noqa: E731
        return sorted(
            out, key=lambda brief: (not trains(brief), 0 if trains(brief) else -brief["updated"], brief["id"])
        )

    def _brief(self, id: str, folder: Path) -> dict[str, Any] | None:
        file = self.open(folder, LOG)
        if file is None:
            return self._stream_brief(folder)
        with file:
            about = os.fstat(file.fileno())
            key = (about.st_ino, about.st_size, about.st_mtime_ns)
            kept = self._briefs.get(id)
            if kept is None or kept[0] != key:
                logs, _ = self.logs(folder)
                tail = run_logs.Tail(folder / LOG, logs, max(0, about.st_size - TAIL_BYTES))
                while tail.advance(file):
                    pass
                kept = self._briefs[id] = key, logs
        return status.brief(kept[1], self._now(), self._stalled) | {"kind": "run"}

    def _stream_brief(self, folder: Path) -> dict[str, Any] | None:
        results, _ = self.json(folder, STREAM)
        if not stream_report.is_stream(results):
            return None
        return {"kind": "stream", "name": folder.name, "state": "finished", "says": "", "step": len(results["stages"]),
                "steps": len(results["stages"]), "updated": (folder / STREAM).stat().st_mtime, "loss": None,
                "alerts": [], "about": f"stream of {len(results['stages'])} stages"}  # fmt: skip

    def view(self, id: str, since: str = "") -> dict[str, Any]:
        """Returns what a page shows of a run, or what is new in it since the cursor of an earlier answer. KeyError:
        there is no such run."""
        folder = self.folders()[id]
        file = self.open(folder, LOG)
        if file is None:
            results, _ = self.json(folder, STREAM)
            if not stream_report.is_stream(results):
                raise KeyError(id)
            return stream_report.view(id, folder.name, results)
        with file:
            view = self._view(id, folder, file)
            with view.lock:
                about = os.fstat(file.fileno()).st_size, self._now(), self._stalled
                is_late = lambda: about[0] - view.tail.read > EARLY_BYTES and view.needs_all(since)  # noqa: E731
                if is_late() and since != view.early_cursor:
                    return view.early(file, since, *about)
                until = time.monotonic() + TURN
                while view.tail.advance(file) and time.monotonic() < until:
                    pass
                return view.early(file, since, *about) if is_late() else view.since(since, *about)

    def zoom(self, id: str, axis: str, low: float, high: float) -> dict[str, Any]:
        """Returns the points of a run in a range of an axis, as finely as it has them. KeyError: there is no such
        run."""
        folder = self.folders()[id]
        file = self.open(folder, LOG)
        if file is None:
            raise KeyError(id)
        with file:
            view = self._view(id, folder, file)
            with view.lock:
                return view.zoom(axis, low, high)

    def _view(self, id: str, folder: Path, file: BinaryIO) -> View:
        """Returns the view of a run, a fresh one if its log is another file than before, as after a restart."""
        about = os.fstat(file.fileno())
        with self._lock:
            view = self._views.pop(id, None)
            if view is None or view.inode != about.st_ino or about.st_size < view.tail.read:
                logs, faults = self.logs(folder)
                view = View(id, about.st_ino, run_logs.Tail(folder / LOG, logs), faults)
            self._views[id] = view  # the last is the newest
            while len(self._views) > 1 and sum(v.numbers for v in self._views.values()) > MOST_NUMBERS:
                del self._views[next(iter(self._views))]
            return view
