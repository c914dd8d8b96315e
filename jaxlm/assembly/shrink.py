"""A trained model becomes a smaller one of its family: a new run directory to start from, evaluate and export.

What goes is chosen on calibration text, and the loss on held-out text is measured before and after.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.assembly import calibrated_program, convert, resized, run_directory, scoring
from jaxlm.assembly.calibrated_program import CalibratedProgram
from jaxlm.assembly.open_model import Place, Pretrained, open_model, program
from jaxlm.assembly.program import Program
from jaxlm.assembly.smaller_config import NAMES, size_of, smaller
from jaxlm.assembly.smaller_weights import Made, Maker
from jaxlm.core import config_io, spec
from jaxlm.core.shrinking import Shrinking
from jaxlm.formats import model_card
from jaxlm.runtime import mesh


@dataclass(frozen=True)
class Shrunk:
    """A Shrunk says what was made: lines on it, the record that the directory holds, and a table."""

    notes: list[str]
    record: dict[str, Any]

    def table(self) -> str:
        """Returns what the model was and is, line by line."""
        lines = [f"{'':24}{'before':>16}{'after':>16}"]
        for name, (a, b) in self.record["sizes"].items():
            lines.append(f"{name:24}{a:>16,}{b:>16,}{(b - a) / a:>+10.1%}")
        for name, (x, y) in self.record["figures"].items():
            lines.append(f"{name:24}{x:>16.5g}{y:>16.5g}")
        return "\n".join(lines)


def shrink(
    model: Place, target: str | Path, settings: Shrinking, calibration: Sequence[str] = (),
    held_out: Sequence[str] = (), step: int | None = None,
) -> Shrunk:  # fmt: skip
    """Writes a run directory with the smaller model.

    `calibration`: sources of text that units are judged on; empty: those that the run was trained on. `held_out`: those
    of the loss before and after; empty: the run's own, or a tenth of the calibration's documents. ValueError: the model
    can't have these sizes, text is missing or too short, or `target` is there already; nothing is left then.
    """
    folder = convert.fresh(target)
    config_io.check(settings, "")
    with run_directory.removed_if_refused(folder, (BaseException,)):
        p = open_model(model, step)
        resized.check_plain(p, "shrink")
        c = smaller(p, settings)
        named = calibration or calibrated_program.own_sources(p)
        if not named and not held_out and settings.importance == "magnitude" and not settings.compensate:
            calibrated, held = None, None  # nothing is read
        else:
            calibrated, held = calibrated_program.with_held_out(p, calibration, held_out, settings.batches)
        made = Maker(p, settings, calibrated).make(c)
        notes = resized.write(p, folder, made.config, made.weights, {"shrunk": settings.importance})
        record = _record(p, settings, calibrated, made)
        after = open_model(folder)
        record["sizes"] = _sizes(p, after)
        record["figures"] = (
            {} if calibrated is None or held is None else _compared(p, after, calibrated.p, held, settings)
        )
        record["card"] = _card(p, record)
        (folder / convert.SHRUNK).write_text(json.dumps(record, indent=1) + "\n")
        told = f"{convert.SHRUNK}: what was kept, and the figures before and after"
        return Shrunk([*made.notes, *notes, told], record)


# ------------------------------------------------------------------------------------------------------- what is told


def _record(p: Pretrained, s: Shrinking, c: CalibratedProgram | None, made: Made) -> dict[str, Any]:
    return {
        "source": p.source.path.name,
        "importance": s.importance,
        "compensate": s.compensate,
        "calibration": [] if c is None else [model_card.name_of(place) for place in c.sources],
        "batches": s.batches,
        "kept": made.kept,
    }


def _sizes(before: Pretrained, after: Pretrained) -> dict[str, tuple[int, int]]:
    """Returns each size that changed, and the parameters and bytes, before and after."""
    out = {}
    for name in NAMES:
        a, b = (size_of(x.model.config, name) for x in (before, after))
        if a is not None and b is not None and a != b:
            out[name] = (a, b)
    a, b = (spec.count(x.model.specs) for x in (before, after))
    return out | {"parameters": (a, b), "bytes in float32": (4 * a, 4 * b)}


def _compared(
    before: Pretrained, after: Pretrained, used: Program, held: scoring.HeldOut, s: Shrinking
) -> dict[str, tuple[float, float]]:
    """Returns the figures of both models on the same held-out text."""
    p = program(after, used.run.data.valid or None, settings=used.run.objective)
    both = []
    for place, weights in ((used, before.params), (p, after.params)):
        with mesh.on_mesh(place.mesh):
            both.append(scoring.Scorer(place)(weights, held, s.held_out_batches).figures)
    return {name: (float(both[0][name]), float(both[1][name])) for name in both[0]} | {
        "window in tokens": (used.run.train.seq_len,) * 2
    }


def _card(p: Pretrained, record: Mapping[str, Any]) -> str:
    """Returns a sentence for the model's card."""
    sizes = ", ".join(f"{name} from {a:,} to {b:,}" for name, (a, b) in record["sizes"].items() if "bytes" not in name)
    on = ", ".join(f"`{place}`" for place in record["calibration"])
    return (
        f"Made smaller from {p.source.path.name}: {sizes}, chosen by {record['importance']}{f' on {on}' if on else ''}."
    )
