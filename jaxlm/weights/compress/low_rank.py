"""Factors matrices into two narrow ones, whose products with the recorded inputs are the nearest that the rank allows
(whitened singular values, as in SVD-LLM, Wang et al. 2025), and solves a matrix of a model so.

I inputs, O outputs, R rank. Everything is multiplied at full precision on any device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.core.compression import Svd
from jaxlm.weights.compress.solution import Solution, measured
from jaxlm.weights.compress.statistics import HIGHEST, Statistics
from jaxlm.weights.factored import Factored

Dims = tuple[int, ...]

UNSEEN = 1e-6
"""Directions of inputs whose mean square is below this share of the largest count as never seen."""


class Factors(struct.PyTreeNode):
    """Factors are two matrices whose product stands for one."""

    a: jax.Array
    """`[I, R]`."""
    b: jax.Array
    """`[R, O]`."""
    error: jax.Array
    """The mean over tokens of the squared difference of the products, summed over outputs: the sum of the squares of
    the singular values that went."""
    whole: jax.Array
    """The same of a product that is zero."""


def factored(w: jax.Array, rank: int, hessian: jax.Array | None = None) -> Factors:
    """Returns the factors of `w` `[I, O]` of the least error for inputs with the second moments `hessian` `[I, I]`;
    None: for inputs that are uncorrelated and equally large. It is a pure function of one matrix; use `vmap` for many.

    With H = SᵀS the error of W − AB is the squared Frobenius norm of S(W − AB), and of all products of a rank the cut
    singular value decomposition of SW is nearest to it (Eckart and Young 1936); so S⁻¹ times that is the best. S is the
    symmetric root of H, which also exists where inputs depend on each other; any other root, such as the transposed
    Cholesky factor, gives the same product.
    """
    if not 0 < rank <= min(w.shape):
        raise ValueError(f"rank: {rank} is none of a matrix of {w.shape[0]} x {w.shape[1]}; give 1 to {min(w.shape)}")
    dtype: Any = jnp.promote_types(w.dtype, jnp.float32)
    w = w.astype(dtype)
    if hessian is None:
        u, d, v = jnp.linalg.svd(w, full_matrices=False)
    else:
        squares, basis = jnp.linalg.eigh(hessian.astype(dtype))
        seen = squares > UNSEEN * squares[-1]
        root = jnp.sqrt(jnp.where(seen, squares, 0))
        u, d, v = jnp.linalg.svd(root[:, None] * jnp.dot(basis.T, w, precision=HIGHEST), full_matrices=False)
        u = jnp.dot(basis, jnp.where(seen, 1 / jnp.where(seen, root, 1), 0)[:, None] * u, precision=HIGHEST)
    share = jnp.sqrt(d[:rank])  # both factors are equally large, so that they train alike
    squared = jnp.square(d)
    return Factors(u[:, :rank] * share[None], share[:, None] * v[:rank], squared[rank:].sum(), squared.sum())


def leaf(found: Factors, ins: Dims, outs: Dims) -> Factored:
    """Returns the weight of a model that stands for a matrix with inputs and outputs of these dimensions."""
    return Factored(found.a.reshape(*ins, -1), found.b.reshape(-1, *outs), ins=len(ins), outs=len(outs))


def svd(c: Svd, w: jax.Array, s: Statistics, ins: Dims, outs: Dims) -> Solution:
    """Replaces the matrix by two factors of the rank `c.rank`, for the inputs that were recorded.

    The plain method is the cut singular value decomposition of the matrix alone. Raises ValueError without a Hessian.
    """
    hessian = s.needed_hessian()
    damp = c.damp * s.mean_square.mean()
    found, plain = factored(w, c.rank, hessian + damp * jnp.eye(w.shape[0])), factored(w, c.rank)
    made, others = (jnp.dot(f.a, f.b, precision=HIGHEST) for f in (found, plain))
    return Solution(leaf(found, ins, outs), None, **measured(s, w, made, others), damp=damp)
