"""Reads from a run's directory what it cost in a stream: memory, weights and what is kept of earlier tasks."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.assembly import remember
from jaxlm.assembly.task_index import FOLDER
from jaxlm.training.log import read_lines

FIELDS = ("bytes_per_device", "parameters", "trained", "added", "added_bytes", "memory_disk_bytes",
          "memory_device_bytes", "examples", "tokens", "kl_before")  # fmt: skip


def cost(folder: Path) -> dict[str, float | None]:
    """Returns what a run cost; None where its log doesn't say.

    bytes_per_device: of the compiled update, its arguments and what it computes. parameters, trained: counts of
    weights. added, added_bytes: those beyond the model's own, heads and adapters, as they rest. memory_disk_bytes,
    memory_device_bytes: what is kept of earlier tasks, in the directory, and in trees beside the weights. examples,
    tokens: of the rows that are kept. kl_before: at the last validation.
    """
    lines = read_lines(folder / "metrics.jsonl")
    events = {line["name"]: line for line in lines if line["kind"] == "event"}
    valid = [line for line in lines if line["kind"] == "valid"]
    model = events.get("model", {})
    return {
        "bytes_per_device": events.get("compiled", {}).get("bytes_per_device"),
        "parameters": model.get("parameters"),
        "trained": model.get("trainable"),
        "added": model.get("added"),
        "added_bytes": model.get("added_bytes"),
        "memory_device_bytes": model.get("memory_bytes"),
        "kl_before": valid[-1].get("kl_before") if valid else None,
        **kept(folder / FOLDER),
    }


def kept(folder: Path) -> dict[str, float | None]:
    """Returns what a run's memory holds on disk."""
    examples = tokens = 0
    for file in folder.glob(remember.ROWS.format("*")):
        with np.load(file) as rows:
            examples += len(rows["priorities"])
            tokens += sum(int(np.count_nonzero(rows[name])) for name in ("segments", "source_segments")
                          if name in rows.files)  # fmt: skip
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"memory_disk_bytes": size, "examples": examples, "tokens": tokens}


def mean(each: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Returns the mean of each figure over seeds; None where one of them doesn't say."""
    known = {name: [one[name] for one in each] for name in FIELDS}
    return {name: None if None in values else sum(values) / len(values) for name, values in known.items()}  # type: ignore[arg-type]


def costs(folders: list[Path], stages: list[str]) -> dict[str, Any]:
    """Returns what each run of a stream cost, the mean over seeds: its stages and its references. `folders`: of each
    seed."""
    names = {f"after {stage}": f"{i}-{stage}" for i, stage in enumerate(stages, 1)}
    names |= {f"single {stage}": f"single/{i}-{stage}" for i, stage in enumerate(stages, 1)} | {"joint": "joint"}
    there = {name: [folder / place for folder in folders] for name, place in names.items()}
    return {
        name: mean([cost(place) for place in places])
        for name, places in there.items() if all((place / "metrics.jsonl").is_file() for place in places)
    }  # fmt: skip
