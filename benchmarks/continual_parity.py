"""Continual learning beside Avalanche: the same network, data, order and first weights, learned by both.

    python benchmarks/continual_parity.py --torch-python AVALANCHE_VENV/bin/python

Five tasks in a row, each two of the digits of scikit-learn's small images: is it the odd one? One head serves all of
them, so that each task overwrites the one before. A network of 64, 32 and 2 units is trained with plain SGD, 100
examples of each digit, and scored on the rest. Both sides' accuracy matrices are compared as the methods stand, and,
where their definitions differ, with ours set to Avalanche's: then the weights must be the same. Exit status 1 if not.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from continual import interval
from worker import Worker, machine, save, table

from jaxlm.core.continual import SI
from jaxlm.evaluation import forgetting
from jaxlm.nn.layout import Layout
from jaxlm.objectives import outputs
from jaxlm.training import optimizers, step
from jaxlm.training.continual import importance, path, penalty, projection

ALLOWED = 1e-4  # of the largest weight, after all tasks
TASKS, UNITS, BATCH, EPOCHS, RATE = 5, 32, 16, 5, 0.1
EWC, SI_STRENGTH, LWF, TEMPERATURE = 100.0, 1.0, 1.0, 2.0
Weights = dict[str, jax.Array]


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--torch-python", required=True, help="a Python that has avalanche-lib")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--save", default="continual_parity", help="name under results/ (- : don't save)")
    return p.parse_args()


def logits(weights: Weights, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


def nll(weights: Weights, batch: dict[str, jax.Array]) -> jax.Array:
    scores = jax.nn.log_softmax(logits(weights, batch["x"]))
    return -jnp.take_along_axis(scores, batch["y"][:, None], -1).sum()


def fisher(weights: Weights, x: np.ndarray, y: np.ndarray) -> Weights:
    """Returns the mean of squared gradients of single examples."""
    over = partial(importance.over_rows, nll, jnp.square)
    return jax.tree.map(lambda s: s / len(x), jax.jit(over)(weights, {"x": x, "y": y}, jnp.ones(len(x))))


def squared_means(weights: Weights, x: np.ndarray, y: np.ndarray) -> Weights:
    """Returns the mean over batches of the squared gradient of a batch's mean loss, as Avalanche has it, doubled for
    the ½ that its penalty lacks."""
    gradient, sums = jax.jit(jax.grad(nll)), []
    for at in range(0, len(x), BATCH):
        part = {"x": jnp.asarray(x[at : at + BATCH]), "y": jnp.asarray(y[at : at + BATCH])}
        sums.append(jax.tree.map(lambda g: 2 * jnp.square(g / BATCH), gradient(weights, part)))
    return jax.tree.map(lambda *g: sum(g) / len(sums), *sums)


def learn(data: dict[str, np.ndarray], seed: int, method: str, convention: str) -> tuple[np.ndarray, list[Weights]]:
    """Returns the accuracies `[T + 1, T]` and the weights after each task."""
    state_of = optimizers.Optimizer(optax.sgd(RATE), optax.constant_schedule(RATE), lambda path: True, {})
    weights = {name: jnp.asarray(data[f"seed{seed}/{name}"]) for name in ("w1", "b1", "w2", "b2")}
    quadratic, matrix, every = None, [accuracies(weights, data)], []
    seen: dict[str, list[np.ndarray]] = {"x": [], "y": []}
    for task in range(TASKS):
        order = data[f"seed{seed}/order{task}"]
        # All that was seen, in the order it was, is what Avalanche's methods look at after a task and remember.
        x, y = (data[f"{part}{task}"][order.reshape(-1)] for part in "xy")
        memory: dict[str, Any] = {"teacher": weights} if method == "lwf" and task else {}
        memory |= {"quadratic": quadratic} if quadratic is not None else {}
        reference = {name: np.concatenate(parts) for name, parts in seen.items()} if method == "agem" and task else None
        make = update(state_of, method, convention, memory, reference)
        tracks = path.si_start(weights) if method == "si" else None
        # A step donates nothing here, so the weights at the start may serve as the teacher's and the penalty's.
        state = step.start(weights, jax.tree.map(lambda w: None, weights), state_of, ema=False, tracks=tracks)
        state = state.replace(memory=memory or None)
        for at in range(0, len(x), BATCH):
            state, _ = make(state, {"x": x[None, at : at + BATCH], "y": y[None, at : at + BATCH]})
        seen["x"].append(x)
        seen["y"].append(y)
        weights = state.params
        if method == "ewc":
            found = squared_means(weights, x, y) if convention == "avalanche" else fisher(weights, x, y)
        if method == "si":
            found = path.si_importance(SI(damping=0.1), state.tracks, weights)
        if method in ("ewc", "si"):
            quadratic = penalty.joined(quadratic, found, weights)
        matrix.append(accuracies(weights, data))
        every.append(weights)
    return np.array(matrix), every


def update(
    optimizer: optimizers.Optimizer, method: str, convention: str, memory: dict[str, Any], reference: Any
) -> Callable[..., Any]:
    """Returns the jitted update of a task."""
    alpha = LWF / TEMPERATURE**2 if convention == "avalanche" else LWF

    def loss(weights: Weights, batch: Any, key: jax.Array, kept: Any = None) -> dict[str, dict[str, jax.Array]]:
        value = nll(weights, batch)
        if kept is not None and "teacher" in kept:
            old, new = (outputs.Predicted(logits(w, batch["x"])[None], jnp.ones((1, len(batch["y"]))))
                        for w in (kept["teacher"], weights))  # fmt: skip
            value += alpha * outputs.total(
                outputs.divergence(old, new, outputs.Measure(temperature=TEMPERATURE), Layout()), new
            )
        return {"task": {"loss": value}}

    def pull(weights: Weights, kept: Any) -> jax.Array:
        return (EWC if method == "ewc" else SI_STRENGTH) * penalty.value(kept["quadratic"], weights)

    keeping = step.Keeping(penalty=pull if "quadratic" in memory else None)
    if method == "si":
        keeping = keeping._replace(observe=lambda tracks, *moved: path.si_observe(tracks, *moved))
    if reference is not None:
        size, earlier = len(reference["y"]), jax.tree.map(jnp.asarray, reference)
        # Both parts' sums are divided by the batch's size.
        mean = lambda g: jax.tree.map(lambda x: x * BATCH / size, g)  # noqa: E731
        keeping = keeping._replace(parts=lambda batch: [batch, earlier],
                                   combine=lambda g: projection.agem(g[0], mean(g[1])))  # fmt: skip
    totals = lambda batch: {"task": jnp.float32(BATCH)}  # noqa: E731
    return jax.jit(step.make_train_step(loss, totals, optimizer, seed=0, clip=0.0, ema=0.0, keeping=keeping))


def accuracies(weights: Weights, data: dict[str, np.ndarray]) -> list[float]:
    return [float((logits(weights, data[f"test_x{i}"]).argmax(-1) == data[f"test_y{i}"]).mean()) for i in range(TASKS)]


def main() -> None:
    a = arguments()
    settings = {"tasks": TASKS, "units": UNITS, "batch": BATCH, "epochs": EPOCHS, "rate": RATE, "ewc": EWC,
                "si": SI_STRENGTH, "lwf": LWF, "temperature": TEMPERATURE, "seeds": a.seeds}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        peer = Worker(a.torch_python, "continual_parity_torch.py", settings | {"folder": folder}, {}, 1)
        versions = peer.ask("prepare")
        with np.load(Path(folder) / "data.npz") as stored:
            data = dict(stored)
        runs, worst = [], 0.0
        for method in ("naive", "ewc", "si", "lwf", "agem"):
            theirs = [peer.ask("learn", seed=seed, method=method) for seed in a.seeds]
            runs.append((method, "Avalanche", [np.array(t["matrix"]) for t in theirs], None))
            for convention in ("own", *(("avalanche",) if method in ("ewc", "lwf") else ())):
                ours = [learn(data, seed, method, convention) for seed in a.seeds]
                apart = max(
                    float(np.abs(np.asarray(w[-1][name]) - np.array(t["weights"][name])).max())
                    / float(np.abs(np.array(t["weights"][name])).max())
                    for (_, w), t in zip(ours, theirs, strict=True)
                    for name in w[-1]
                )
                name = "jaxlm" if convention == "own" else "jaxlm, Avalanche's definition"
                runs.append((method, name, [m for m, _ in ours], apart))
                if convention == "avalanche" or method in ("naive", "agem"):
                    worst = max(worst, apart)
        peer.close()
    results, rows = [], []
    for method, name, matrices, apart in runs:
        found = forgetting.over_seeds([forgetting.figures(m) for m in matrices])
        shown = [
            interval([None if np.isnan(x) else x for x in found[key]]) for key in ("average", "learned", "forgetting")
        ]
        rows.append([method, name, *shown, "" if apart is None else f"{apart:.1e}"])
        results.append({"method": method, "of": name, "figures": found, "weights_apart": apart})
    print(table(rows, ["method", "of", "average", "learned", "forgetting", "weights apart"]))
    print(f"where the definitions are the same the weights differ by at most {worst:.1e}")
    if a.save != "-":
        save(a.save, {"machine": machine(), "settings": settings | {"jax": jax.__version__, "peer": versions},
                      "results": results})  # fmt: skip
    sys.exit(worst >= ALLOWED)


if __name__ == "__main__":
    main()
