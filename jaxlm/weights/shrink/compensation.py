"""Makes up for units that go by the weights of those that stay: least squares over recorded inputs, as of each layer
alone (He et al. 2017).

L layers, I inputs of a matrix, S those that stay, O outputs.
"""

import numpy as np


def compensated(w: np.ndarray, hessian: np.ndarray, kept: np.ndarray, damp: float = 1e-6) -> tuple[np.ndarray, float]:
    """Returns the matrix `[S, O]` whose products with the inputs that stay are nearest to those of `w` `[I, O]` with
    all of them, and the share of the mean square of these products that it misses.

    `hessian` `[I, I]`: the mean of x xᵀ; `kept` `[S]`: the inputs that stay. `damp`, a share of the mean square,
    decides between inputs that always were the same.
    """
    H, w = hessian.astype(np.float64), w.astype(np.float64)
    inside = H[np.ix_(kept, kept)]
    inside = inside + damp * max(np.diagonal(inside).mean(), np.finfo(np.float64).tiny) * np.eye(len(kept))
    change = np.linalg.solve(inside, H[kept] @ w - H[np.ix_(kept, kept)] @ w[kept])
    made = w[kept] + change
    off = w.copy()
    off[kept] -= made
    missed, whole = float((off * (H @ off)).sum()), float((w * (H @ w)).sum())
    return made.astype(np.float32), max(missed, 0.0) / whole if whole > 0 else 0.0
