"""Writes tests/golden/merge.npz: what mergekit makes of the tensors of tests/support/merge_rows.py by each method.

Run it where mergekit 0.1.5 is installed: `PYTHONPATH=.:tests python tests/golden/make_merge.py`. The tests read the
file and need neither mergekit nor PyTorch. What mergekit draws at random is drawn by this package in its place, since
no two generators agree.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from mergekit.merge_methods.api import merge_tensors
from support.merge_rows import NAME, ROWS, models

from jaxlm.weights import merging


def made(s: merging.Settings, shape: tuple[int, ...]) -> np.ndarray:
    """Returns mergekit's tensor for a row of settings."""
    base, *thetas = map(torch.tensor, models(shape))
    thetas = thetas[: merging.METHODS[s.method].most]
    weights, values = s.weights or (1.0,) * len(thetas), dict[str, Any]()
    match s.method:
        case "linear":
            return merge_tensors(thetas, "linear", parameters={"weight": weights}).numpy()
        case "slerp":
            return merge_tensors(thetas, "slerp", parameters={"t": s.t}, base_index=0).numpy()
        case "task_arithmetic" | "ties" | "dare_linear" | "dare_ties" | "breadcrumbs":
            values = {"weight": dict(enumerate(weights, 1)), "lambda": s.scale or 1.0, "density": s.density or 1.0}
    if s.rescale == "density":  # as published: the kept changes are divided by the share that is kept
        values |= {"rescale": False, "lambda": values["lambda"] / s.density}
    elif s.rescale:
        values["rescale"] = s.rescale == "l1"
    if s.gamma is not None:
        values["gamma"] = s.gamma
    numbers = iter(range(len(thetas)))

    def bernoulli(shares: torch.Tensor) -> torch.Tensor:
        mask = merging.random_kept(s.seed, next(numbers), NAME, 0, shares.numel(), s.density)
        return torch.tensor(mask.reshape(shares.shape), dtype=shares.dtype)

    with patch.object(torch, "bernoulli", bernoulli):
        return merge_tensors([base, *thetas], s.method, parameters=values, base_index=0).numpy()


if __name__ == "__main__":
    out = {f"{row}/{len(shape)}": made(s, shape) for row, (s, shapes) in ROWS.items() for shape in shapes}
    np.savez_compressed(Path(__file__).parent / "merge.npz", **out)
    print(len(out), "tensors")
