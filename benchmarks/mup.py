"""Learning rates that are tuned on a small model, used on wider ones and on deeper ones: standard scaling beside μP and
CompleteP.

    python benchmarks/mup.py --data FILE --cache FOLDER

FILE is text, such as Tiny Shakespeare. Models of Llama's form on bytes train 200 steps of 16 rows of 64 bytes with
AdamW at each of the rates, and the loss on the same validation rows is told. Widths 64, 128 and 256 have 2, 4 and 8
heads and two layers; the model of width 64 is the base, where both parametrisations are the same runs. With `--depth`
there are deeper models too, of width 64 and eight layers. At the largest sizes the rate that was best on the base, and
the one that is best there, are trained with two more seeds, which gives the noise. Every finished run is saved at once,
and the same command goes on.

Exit status 1 if at the largest width the base's rate is, under μP, worse than the best one by more than twice the
standard deviation over seeds, or not better than the base's rate under standard scaling.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from worker import HERE, machine, save, table

sys.path.insert(0, str(HERE.parent))

WIDTHS, LAYERS, DEPTH = (64, 128, 256), 2, 8
RATES = tuple(0.001 * 2**i for i in range(7))
STEPS = 200


class Cell(NamedTuple):
    """A run of the table."""

    arm: str
    """standard or mup."""
    width: int
    layers: int
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.arm}/{self.width}/{self.layers}/{self.rate:g}/{self.seed}"


def base_is_shared(arm: str, width: int, layers: int) -> str:
    """The arm under which a run is kept: both are the same on the base."""
    return "standard" if (width, layers) == (WIDTHS[0], LAYERS) else arm


def train(a: argparse.Namespace, cell: Cell) -> dict[str, float]:
    """Train a run; its validation loss in nats a byte, and its CPU seconds."""
    import jaxlm
    from jaxlm.models import llama
    from jaxlm.objectives import causal

    c = llama.Config(
        vocab=264, layers=cell.layers, width=cell.width, heads=cell.width // 32, kv_heads=cell.width // 32,
        head_width=32, ffn=2 * cell.width, positions=64,
    )  # fmt: skip
    mup = jaxlm.Transfer("mup", base_width=WIDTHS[0], base_layers=LAYERS, base_head_width=32)
    run = jaxlm.Run(
        name="mup", model=c, objective=causal.Config(),
        data=jaxlm.Data(train=(str(a.data),), holdout=0.05, tokenizer="bytes", cache=str(a.cache)),
        optim=jaxlm.Optim(lr=cell.rate, warmup=20), transfer=jaxlm.Transfer() if cell.arm == "standard" else mup,
        train=jaxlm.Train(steps=STEPS, batch_size=16, seq_len=64), execution=jaxlm.Execution(dtype="float32"),
        seed=cell.seed,
    )  # fmt: skip
    began = time.process_time()
    program = jaxlm.Program(run)
    state, batches = program.init(), program.batches()
    for _ in range(STEPS):
        state, metrics = program.step(state, next(batches))
    figures = program.validate(state, 16)
    finite = float(metrics["finite"]) == 1
    return {"loss": figures["loss"] if finite else float("nan"), "cpu_s": round(time.process_time() - began, 1)}


def cells(found: dict[str, Any], depth: bool, rates: list[float]) -> Iterator[Cell]:
    """The runs in their order; those with more seeds follow from the others."""
    wide = [(width, LAYERS) for width in WIDTHS]
    for sizes in [wide] + [[(WIDTHS[0], DEPTH)]] * depth:
        for width, layers in sizes:
            first = RATES[0] if (width, layers) == (WIDTHS[0], LAYERS) else best(found, "standard", WIDTHS[0], LAYERS)
            for rate in sorted(rates, key=lambda rate: abs(math.log(rate / first))):  # those near the base's best
                for arm in ("mup", "standard"):
                    yield Cell(base_is_shared(arm, width, layers), width, layers, rate, 0)
        for arm in ("mup", "standard"):
            width, layers = sizes[-1]
            for rate in sorted({best(found, arm, WIDTHS[0], LAYERS), best(found, arm, width, layers)}):
                yield from (Cell(arm, width, layers, rate, seed) for seed in (1, 2))


def loss(found: dict[str, Any], arm: str, width: int, layers: int, rate: float, seed: int = 0) -> float:
    done = found["runs"].get(Cell(base_is_shared(arm, width, layers), width, layers, rate, seed).key)
    return float("nan") if done is None or done["loss"] is None else done["loss"]


def best(found: dict[str, Any], arm: str, width: int, layers: int) -> float:
    """The rate of the lowest loss of seed 0."""
    losses = {rate: loss(found, arm, width, layers, rate) for rate in RATES}
    return min((rate for rate in RATES if losses[rate] == losses[rate]), key=lambda rate: losses[rate])


def seeds(found: dict[str, Any], arm: str, width: int, layers: int, rate: float) -> list[float]:
    return [loss(found, arm, width, layers, rate, seed) for seed in range(3)]


def report(found: dict[str, Any], depth: bool) -> dict[str, Any]:
    """Print the tables; what they say."""
    rows, verdict = [], {}
    sizes = [(width, LAYERS) for width in WIDTHS] + [(WIDTHS[0], DEPTH)] * depth
    for arm in ("standard", "mup"):
        for width, layers in sizes:
            losses = [loss(found, arm, width, layers, rate) for rate in RATES]
            if all(x != x for x in losses):
                continue
            rows.append([f"{arm} {width} x {layers}", *losses, best(found, arm, width, layers)])
    print(table(rows, ["validation loss, seed 0", *(f"{rate:g}" for rate in RATES), "best rate"]), flush=True)
    for width, layers in sizes[len(WIDTHS) - 1 :]:
        for arm in ("standard", "mup"):
            try:
                tuned, own = best(found, arm, WIDTHS[0], LAYERS), best(found, arm, width, layers)
            except ValueError:
                continue
            both = [seeds(found, arm, width, layers, rate) for rate in (tuned, own)]
            if any(x != x for losses in both for x in losses):
                continue
            means = [statistics.mean(x) for x in both]
            noise = max(statistics.stdev(x) for x in both)
            verdict[f"{arm} {width} x {layers}"] = {
                "rate_of_base": tuned, "loss_at_it": means[0], "best_rate": own, "loss_at_best": means[1],
                "regret": means[0] - means[1], "noise": noise,
            }  # fmt: skip
    if verdict:
        head = ["3 seeds", "base's rate", "loss at it", "best rate", "loss there", "regret", "noise (sd)"]
        print(table([[name, *v.values()] for name, v in verdict.items()], head), flush=True)
    return verdict


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--cache", type=Path, required=True, help="a folder for tokens, which is kept")
    p.add_argument("--depth", action="store_true", help="train the deeper models too")
    p.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="train these alone now")
    p.add_argument("--save", default="mup", help="name under results/")
    a = p.parse_args()
    file = HERE / "results" / f"{a.save}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"runs": {}}
    import jax
    import numpy as np

    found["about"] = {
        "machine": machine(), "jax": jax.__version__, "numpy": np.__version__, "widths": WIDTHS,
        "layers": (LAYERS, DEPTH), "rates": RATES, "steps": STEPS, "base": {"width": WIDTHS[0], "layers": LAYERS},
    }  # fmt: skip
    for cell in cells(found, a.depth, a.rates):
        if cell.key not in found["runs"]:
            done = train(a, cell)
            found["runs"][cell.key] = done | ({} if done["loss"] == done["loss"] else {"loss": None})
            print(cell.key, done, flush=True)
            save(a.save, found)
    found["verdict"] = report(found, a.depth)
    save(a.save, found)
    last = {arm: found["verdict"][f"{arm} {WIDTHS[-1]} x {LAYERS}"] for arm in ("standard", "mup")}
    worse = last["mup"]["regret"] > 2 * last["mup"]["noise"]
    sys.exit(worse or last["mup"]["loss_at_it"] >= last["standard"]["loss_at_it"])


if __name__ == "__main__":
    main()
