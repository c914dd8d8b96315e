"""Settings of merges that mergekit's results are stored for, and the tensors that they are made of."""

import numpy as np

from jaxlm.weights.merging import Settings

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(24, 18), (31,)]
ROWS: dict[str, tuple[Settings, list[tuple[int, ...]]]] = {
    name: (settings, SHAPES)
    for name, settings in {
        "linear": Settings("linear"),
        "linear_weighted": Settings("linear", weights=(0.2, 0.7, -0.3)),
        "slerp": Settings("slerp", t=0.3),
        "task_arithmetic": Settings("task_arithmetic", weights=(0.4, 1.0, 0.7), scale=0.6),
        "ties": Settings("ties", weights=(0.5, 0.3, 0.4), density=0.3),
        "ties_whole": Settings("ties", density=1.0, scale=0.7),
        "dare_linear": Settings("dare_linear", weights=(0.5, 0.3, 0.4), density=0.4, rescale="density", seed=3),
        "dare_linear_l1": Settings("dare_linear", density=0.4, rescale="l1", seed=3),
        "dare_ties": Settings("dare_ties", weights=(0.5, 0.3, 0.4), density=0.4, rescale="density", seed=4),
        "dare_ties_l1": Settings("dare_ties", density=0.6, rescale="l1", seed=4),
        "dare_ties_off": Settings("dare_ties", density=0.6, rescale="off", seed=4),
        "breadcrumbs": Settings("breadcrumbs", density=0.5, gamma=0.1),
        "breadcrumbs_few": Settings("breadcrumbs", density=0.9, gamma=0.2),
        "model_stock": Settings("model_stock"),
    }.items()
}


def models(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Returns a base and three models whose changes have a direction in common, as float32."""
    rng = np.random.default_rng(len(shape))
    base, common = rng.standard_normal((2, *shape))
    thetas = [base + 0.3 * common + 0.3 * rng.standard_normal(shape) for _ in range(3)]
    return [x.astype(np.float32) for x in (base, *thetas)]
