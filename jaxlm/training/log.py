"""Writes what a run says into its folder: `metrics.jsonl`, samples and TensorBoard events.

Everything that depends on the clock stands under the key `time` of a line, so two runs are compared bit for bit by
dropping that one key.
"""

import json
import math
import os
import time as clock
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESERVED = ("kind", "step", "name", "time")


class RunLog:
    """A RunLog writes one JSON object a line, each with one system call, so that a killed process loses at most the
    last line.

    With `resume_step` it first drops everything later than that step; with None it appends. `ended` says that this step
    was the last one, so that the samples and events of the run's end, which follow its checkpoint, are dropped as well.
    It is `enabled` on process 0 of a run alone.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
        ended: bool = False,
        enabled: bool = True,
    ):
        self._lines = self._samples = self._events = None
        if not enabled:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path, samples = folder / "metrics.jsonl", folder / "samples.txt"
        if path.exists():
            lines = read_lines(path)
            if resume_step is not None:
                lines = [line for line in lines if line["step"] <= resume_step]
                if ended:
                    lines = [x for x in lines if x["step"] < resume_step or _precedes_end(x)]
            replace_file(path, "".join(map(_line, lines)))
            replace_file(samples, "".join(_sample(x) for x in lines if x["kind"] == "sample"))
        if tensorboard:
            purge = None if resume_step is None else resume_step + 1
            self._events = _tensorboard()(str(folder / "events"), purge_step=purge, flush_secs=10)
        self._lines = open(path, "ab", buffering=0)  # noqa: SIM115  it stays open as long as the run
        self._samples = open(samples, "ab", buffering=0)  # noqa: SIM115

    def train(self, step: int, metrics: Mapping[str, Any], time: Mapping[str, Any]) -> None:
        """Logs a training step; `time` holds what depends on the clock."""
        self._numbers("train", step, metrics, time)

    def valid(self, step: int, metrics: Mapping[str, Any], time: Mapping[str, Any]) -> None:
        """Logs a validation; `time` holds what depends on the clock."""
        self._numbers("valid", step, metrics, time)

    def event(self, step: int, name: str, **info: Any) -> None:
        """Logs what happened once; fields that depend on the clock go into `time={…}`."""
        self._write({"kind": "event", "step": step, "name": name, **info})

    def sample(self, step: int, prompt: str, text: str, goes_on: bool = True) -> None:
        """Logs the `text` that the model wrote after `prompt`, from which it goes on or which it answers."""
        line = {"kind": "sample", "step": step, "prompt": prompt, "text": text, "goes_on": goes_on}
        self._write(line)
        if self._samples is not None:
            self._samples.write(_sample(line).encode())
        if self._events is not None:
            self._events.add_text(f"sample/{prompt[:40]}", text, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._lines, self._samples, self._events):
            if file is not None:
                file.close()
        self._lines = self._samples = self._events = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _numbers(self, kind: str, step: int, metrics: Mapping[str, Any], time: Mapping[str, Any]) -> None:
        if bad := [name for name in metrics if name in RESERVED]:
            raise ValueError(f"a metric may not be called {bad[0]!r}: rename it")
        self._write({"kind": kind, "step": step, **metrics, "time": dict(time)})
        if self._events is not None:
            for name, value in [*metrics.items(), *((f"time/{k}", v) for k, v in time.items())]:
                if value is not None:
                    self._events.add_scalar(f"{kind}/{name}", float(value), step)

    def _write(self, line: dict[str, Any]) -> None:
        if self._lines is not None:
            stamped = {**line, "time": {**line.get("time", {}), "unix": round(clock.time(), 3)}}
            self._lines.write(_line(stamped).encode())


def read_lines(path: str | os.PathLike) -> list[dict]:
    """Returns the lines of a `metrics.jsonl`.

    A last line without its end was cut by a kill, and is left out. Values that JSON has no number for come as "NaN",
    "Infinity", "-Infinity". Raises ValueError, which names the line, for any other fault.
    """
    *complete, _ = Path(path).read_bytes().split(b"\n")
    return [read_line(text, path, number) for number, text in enumerate(complete, 1)]


def read_line(text: bytes, path: str | os.PathLike, number: int) -> dict:
    """Returns a line of a log. ValueError: it is none, said with its number."""
    try:
        line = json.loads(text)
        line["step"] + 0, line["kind"], line.get("time", {}).get
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, line {number} is not a line of this log: mend or delete it ({error})") from error
    return line


def _line(line: dict) -> str:
    return json.dumps(_plain(line), allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Converts to JSON's own types. Python writes a float with as many digits as tell it apart from every other
    float."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):  # a scalar of numpy or JAX; anything larger raises
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _sample(line: dict) -> str:
    prompt = line["prompt"]
    return f"── step {line['step']} ── {prompt!r}\n{shown(prompt, line['text'], line.get('goes_on', True))}\n\n"


def shown(prompt: str, text: str, goes_on: bool = True) -> str:
    """Returns a prompt with what a model wrote after it, on a line of its own where it doesn't go on from it."""
    return prompt + text if goes_on else f"{prompt}\n→ {text}"


def _precedes_end(line: dict) -> bool:
    """Returns whether a line of the last step was written before its checkpoint was saved."""
    validation = line.get("name") == "gain" or (line.get("name") == "answers" and line.get("part") == "valid")
    return line["kind"] in ("train", "valid") or validation


def replace_file(path: Path, text: str) -> None:
    """Writes all of the text or, whenever the process is killed, leaves the file as it was."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _tensorboard() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'TensorBoard events need tensorboardX: pip install "jaxlm[report]", or switch them off'
        ) from error
    return SummaryWriter
