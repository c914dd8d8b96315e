"""`jaxlm predict` labels texts with a fine-tuned model."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import UseAppendAction

from jaxlm.commands.arguments import Command, Done, Model, start_processes
from jaxlm.core.ranges import Natural


@dataclass(frozen=True)
class Predict(Command):
    """Labels texts with a model that was fine-tuned for a labelled task: classes with probabilities, entities, answers,
    relations, choices. Reads --text, --data, or else the lines of its input; writes JSON lines to a pipe or --out, and
    a table to a terminal.

    example: jaxlm predict runs/sst2 --text 'A lovely film.' --text 'Two hours that I want back.'
    """

    model: Model
    text: UseAppendAction[tuple[str, ...]] = ()
    """A text, or a JSON object of an input's parts: '{"question": "Who?", "context": "Ada did."}'."""
    data: str | None = None
    """A .csv, .tsv, .json or .jsonl table with the columns of the training data (labels aren't needed), a .txt file
    with a text a line, or .conll words."""
    step: Natural | None = None
    """The checkpoint's; None: the newest."""
    out: Path | None = None
    """A new .jsonl file of the inputs with what the model says of each."""

    def run(self, rest: list[str]) -> Done:
        if self.text and self.data:
            raise ValueError("--data: leave it out, or --text")
        if self.out and self.out.exists():
            raise ValueError(f"--out: {self.out} exists; name another file, or remove it")
        start_processes(self)
        from jaxlm.assembly import predict

        given = self.text if self.text or self.data else [line.rstrip("\n") for line in sys.stdin if line.strip()]
        inputs = [predict.parse(text, f"input {i}") for i, text in enumerate(given)]
        cells, told = predict.predict(self.model, inputs, data=self.data, step=self.step)
        lines = [json.dumps(a | b, ensure_ascii=False) + "\n" for a, b in zip(cells, told, strict=True)]
        if self.out:
            self.out.write_text("".join(lines), "utf-8")
            print(f"{self.out}: {len(lines):,} inputs")
            return Done({"out": self.out, "inputs": len(lines)})
        if sys.stdout.isatty():
            _show(cells, told)
        else:
            sys.stdout.writelines(lines)
        return Done({"inputs": cells, "predictions": told})


def _show(cells: list[dict[str, Any]], told: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("input", "prediction", "sure"):
        table.add_column(name)
    for parts, said in zip(cells, told, strict=True):
        shown = " | ".join(" ".join(v) if isinstance(v, list) else str(v) for v in parts.values())
        table.add_row(Text(shown[:60] + ("…" if len(shown) > 60 else "")), Text(said_of(said)), Text(sure(said)))
    Console().print(table)


def said_of(said: dict[str, Any]) -> str:
    """Returns a prediction as a user reads it."""
    if "entities" in said:
        return ", ".join(f"{e['text']} ({e['label']})" for e in said["entities"]) or "no entity"
    if "answer" in said:
        return said["answer"] or "no answer"
    if "tags" in said:
        return " ".join(f"{word}/{tag}" for word, tag in zip(said["words"], said["tags"], strict=True))
    value = next(said[name] for name in ("label", "labels", "value", "choice") if name in said)
    return ", ".join(value) or "no label" if isinstance(value, list) else str(value)


def sure(said: dict[str, Any]) -> str:
    """Returns how sure a model is: the probability of its label, or of its least sure entity."""
    if isinstance(values := said.get("probabilities"), dict):
        return ", ".join(f"{values[a]:.3f}" for a in said.get("labels", [said.get("label")]))
    if isinstance(values, list):
        return f"{max(values):.3f}"
    if said.get("entities"):
        return f"{min(e['score'] for e in said['entities']):.3f}"
    return f"score {said['score']:.2f}" if "score" in said else ""
