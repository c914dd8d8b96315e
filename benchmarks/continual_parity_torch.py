"""Avalanche's side of `continual_parity.py`: it makes the data, and learns the tasks with Avalanche's strategies."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import serve

# A torchvision whose own kernels don't load still refuses to be imported without the names of these two.
_operators = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import avalanche  # noqa: E402
from avalanche.benchmarks import tensors_benchmark  # noqa: E402
from avalanche.training import supervised  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402


def network(units: int, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(64, units), torch.nn.ReLU(), torch.nn.Linear(units, 2))
    with torch.no_grad():
        for layer, number in ((model[0], 1), (model[2], 2)):
            layer.weight.copy_(torch.from_numpy(weights[f"w{number}"].T))
            layer.bias.copy_(torch.from_numpy(weights[f"b{number}"]))
    return model


def main(folder: str, seeds: list[int], **c: Any) -> None:
    file, batch, rate = Path(folder) / "data.npz", c["batch"], c["rate"]

    def prepare() -> dict[str, str]:
        """Writes the tasks' data, and each seed's first weights and orders."""
        x, digit = load_digits(return_X_y=True)
        x = (x / 16).astype(np.float32)
        data: dict[str, np.ndarray] = {}
        for task in range(c["tasks"]):
            each = [np.flatnonzero(digit == 2 * task + i) for i in (0, 1)]
            for part, cut in (("", slice(0, 100)), ("test_", slice(100, None))):
                rows = np.concatenate([indices[cut] for indices in each])
                data[f"{part}x{task}"], data[f"{part}y{task}"] = x[rows], digit[rows] % 2
        n = len(data["x0"]) // batch * batch  # whole batches alone
        for seed in seeds:
            rng = np.random.default_rng(seed)
            shapes = {"w1": (64, c["units"]), "b1": (c["units"],), "w2": (c["units"], 2), "b2": (2,)}
            for name, shape in shapes.items():
                scale = 1 / np.sqrt(shape[0]) if len(shape) == 2 else 0.0
                data[f"seed{seed}/{name}"] = (scale * rng.normal(size=shape)).astype(np.float32)
            for task in range(c["tasks"]):
                orders = [rng.permutation(len(data["x0"]))[:n].reshape(-1, batch) for _ in range(c["epochs"])]
                data[f"seed{seed}/order{task}"] = np.concatenate(orders)
        np.savez(file, **data)
        return {"avalanche": avalanche.__version__, "torch": torch.__version__}

    def learn(seed: int, method: str) -> dict[str, Any]:
        with np.load(file) as stored:
            data = dict(stored)
        model = network(c["units"], {name: data[f"seed{seed}/{name}"] for name in ("w1", "b1", "w2", "b2")})
        shared = dict(
            model=model, optimizer=torch.optim.SGD(model.parameters(), rate), criterion=torch.nn.CrossEntropyLoss(),
            train_mb_size=batch, train_epochs=1, evaluator=None,
        )  # fmt: skip
        strategy = {
            "naive": lambda: supervised.Naive(**shared),
            "ewc": lambda: supervised.EWC(ewc_lambda=c["ewc"], **shared),
            "si": lambda: supervised.SynapticIntelligence(si_lambda=c["si"], **shared),
            "lwf": lambda: supervised.LwF(alpha=c["lwf"], temperature=c["temperature"], **shared),
            "agem": lambda: supervised.AGEM(patterns_per_exp=10**6, sample_size=10**6, **shared),
        }[method]()
        # The examples stand in the order that they are learned in; what a method looks at after a task is of them all.
        tasks = [(torch.from_numpy(data[f"x{i}"]), torch.from_numpy(data[f"y{i}"])) for i in range(c["tasks"])]
        ordered = [(x[o := data[f"seed{seed}/order{i}"].reshape(-1)], y[o]) for i, (x, y) in enumerate(tasks)]
        stream = tensors_benchmark(train_tensors=ordered, test_tensors=tasks, task_labels=[0] * c["tasks"]).train_stream
        matrix = [accuracies(model, data)]
        for experience in stream:
            strategy.train(experience, shuffle=False)
            matrix.append(accuracies(model, data))
        weights = {f"w{k}": layer.weight.T.tolist() for k, layer in ((1, model[0]), (2, model[2]))}
        weights |= {f"b{k}": layer.bias.tolist() for k, layer in ((1, model[0]), (2, model[2]))}
        return {"matrix": matrix, "weights": weights}

    def accuracies(model: torch.nn.Module, data: dict[str, np.ndarray]) -> list[float]:
        with torch.no_grad():
            return [float((model(torch.from_numpy(data[f"test_x{i}"])).argmax(-1).numpy() == data[f"test_y{i}"]).mean())
                    for i in range(c["tasks"])]  # fmt: skip

    serve({"prepare": prepare, "learn": learn})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
