"""First values of LoRA that PEFT takes from the base model, which loses them: PiSSA and OLoRA.

PEFT's files hold what was trained and not what it began as; whoever opens them computes that once more from the base.
W is a module's matrix as published files hold it, [outputs, inputs]; A is [R, inputs], B [outputs, R].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Beginnings that leave the base as it is.
PLAIN = ("gaussian", "eva", "orthogonal", "mica")
CLOSE = 6e-4
"""Singular values that differ by a smaller share are taken for equal. Above it another machine's rounding of 1e-6 moves
the product by less than a thousandth of W."""
WHY = {
    "corda": "from activations that the files don't hold",
    "lora_ga": "from gradients that the files don't hold",
    "loftq": "from rounding to few bits, where the last digit decides",
    "pissa_niter": "from a random search, which comes out otherwise each time",
}
"""Beginnings that can't be computed once more, and what they come from."""


def pissa(w: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (A, B) whose scaled product is the part of W with the largest singular values (Meng et al. 2024).

    ValueError: the values on both sides of the cut are equal, so it could be either part.
    """
    u, d, v = (np.asarray(x) for x in jnp.linalg.svd(jnp.asarray(w, jnp.float32), full_matrices=False))
    if rank < len(d) and d[rank - 1] - d[rank] < CLOSE * d[rank - 1]:
        raise ValueError(f"singular values {rank} and {rank + 1} are equal, so its first values can't be told")
    root = np.sqrt(d[:rank] / scale)
    return root[:, None] * v[:rank], u[:, :rank] * root


def olora(w: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (A, B) whose product is W projected on its first columns (Büyükakyüz 2024).

    ValueError: these columns depend on each other.
    """
    q, r = (np.asarray(x) for x in jnp.linalg.qr(jnp.asarray(w, jnp.float32)))
    d = np.linalg.svd(r[:rank, :rank], compute_uv=False)
    if d[-1] < CLOSE * d[0]:
        raise ValueError(f"its first {rank} columns depend on each other, so its first values can't be told")
    return r[:rank], q[:, :rank]


COMPUTED: dict[str, Callable[[np.ndarray, int, float], tuple[np.ndarray, np.ndarray]]] = {
    "pissa": pissa,
    "olora": olora,
}
"""Beginnings that are functions of W; of both the product is unique though the factors' signs are not."""


def kind(begun: object, file: str) -> str:
    """Returns which of `COMPUTED` a file's `init_lora_weights` is; empty: the base stayed as it was. ValueError: it is
    another."""
    name = begun.lower() if isinstance(begun, str) else ""
    if not name or name in PLAIN:
        return ""
    if name in COMPUTED:
        return name
    why = next((f", {w}" for n, w in WHY.items() if name.startswith(n)), "")
    raise ValueError(
        f"{file}: init_lora_weights {begun!r} changed the base model{why}; save it as plain LoRA with PEFT's "
        "save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge it where it was made"
    )


def whole(w: object, path: str, name: str) -> np.ndarray:
    """Returns the base's weight on this host. ValueError: it isn't all here, or it is stored in few bits."""
    if not isinstance(w, jax.Array) or not w.is_fully_addressable:
        what = "spread over several processes" if isinstance(w, jax.Array) else "stored in few bits"
        raise ValueError(
            f"{path} of the base model is {what}, and {name} adapters need it whole; merge the adapter first: "
            "jaxlm export MODEL+ADAPTER MERGED --format hf"
        )
    return np.asarray(w, np.float32)
