"""Does the device compute what it should? Fused attention beside plain attention, packed rows beside unpacked ones.

Each is judged by its distance from float32, ‖x − y‖ / ‖y‖, and each has a counter-example that must be far off, so that
a comparison that could not fail is itself a failure.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import config, spec
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import attention, losses
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask

# Distances of bfloat16's rounding (3 significant digits) are between 0.002 and 0.01; a wrong mask's are above 0.1.
CLOSE, FAR = 0.02, 0.1

# causal, a window of so many to the row, documents, query heads, key and value heads
CASES = {
    "causal": (True, None, False, 4, 4),
    "causal, grouped queries": (True, None, False, 8, 2),
    "causal, packed documents": (True, None, True, 8, 2),
    "causal, sliding window": (True, 8, False, 8, 2),
    "causal, sliding window, packed documents": (True, 8, True, 8, 2),
    "both ways, packed documents": (False, None, True, 4, 4),
}


def distance(x: Any, y: Any) -> float:
    """‖x − y‖ / ‖y‖ over all leaves, in float64; not a number where x has any."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in
             zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)]  # fmt: skip
    return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)))


def documents(T: int, rows: int) -> np.ndarray:
    """Segments of three documents in each row, then padding."""
    rng = np.random.default_rng(1)
    out = np.sort(rng.integers(1, 4, (rows, T)), -1).astype(np.int32)
    out[:, -(T // 10) :] = 0
    return out


def reference(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """Attention by its definition, in float32."""
    C, G = q_BTHC.shape[-1], q_BTHC.shape[2] // k_BSKC.shape[2]
    k_BSHC, v_BSHC = (jnp.repeat(x, G, 2) for x in (k_BSKC, v_BSKC))
    s_BHTS = jnp.einsum("bthc,bshc->bhts", q_BTHC, k_BSHC, precision="highest") / C**0.5
    p_BHTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], s_BHTS, -1e30), -1)
    return jnp.einsum("bhts,bshc->bthc", p_BHTS, v_BSHC, precision="highest")


def _seen(T: int, causal: bool, window: int | None, seg_BT: np.ndarray | None) -> np.ndarray:
    """Which keys a query may see, written out."""
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    seen_BTS = np.ones((1, T, T), bool)
    if causal:
        seen_BTS &= (t >= s)[None]
    if window is not None:
        seen_BTS &= (abs(t - s) < window)[None]
    return seen_BTS if seg_BT is None else seen_BTS & (seg_BT[:, :, None] == seg_BT[:, None])


def attention_case(name: str, T: int, C: int = 64, B: int = 2) -> dict[str, Any]:
    """Values and the gradients of q, k and v: of the fused kernel, if this device has one, and of plain attention."""
    causal, windows, packed, H, K = CASES[name]
    window, seg_BT = windows and T // windows, documents(T, B) if packed else None
    rng = np.random.default_rng(T)
    tensors = tuple(jnp.asarray(rng.standard_normal((B, T, n, C)), jnp.bfloat16) for n in (H, K, K, H))
    mask = Mask(causal, window, seg_BT, seg_BT)
    choice = attention.choose("auto", mask, False, None, "bfloat16", widths=(C, C), lengths=(T, T))
    chosen = choice.implementation
    # What this case adds to a causal mask is left out; where it adds nothing, the causal mask itself.
    plainer = _seen(T, causal and (packed or window is not None), None, None)

    def both(f: Any, q: jax.Array, k: jax.Array, v: jax.Array, pull: jax.Array) -> Any:
        out, back = jax.vjp(f, q, k, v)
        return out, back(pull)

    @jax.jit
    def run(tensors: Any, mask: Mask, seen: jax.Array, without: jax.Array) -> dict[str, Any]:
        """One program, for a GPU's compiler takes seconds over each. All is an argument, lest it be folded."""
        full = [x.astype(jnp.float32) for x in tensors]  # of the rounded numbers
        out = {n: both(partial(reference, seen_BTS=x), *full) for n, x in (("exact", seen), ("wrong", without))}
        for which in {"xla", chosen}:
            layout = Layout(execution=config.Execution(attention=which))  # type: ignore[arg-type]
            out[which] = both(partial(attention.attend, mask=mask, shard=layout), *tensors)
        return out

    got = run(tensors, mask, _seen(T, causal, window, seg_BT), plainer)
    result = {"auto": chosen, "why": choice.reason, "wrong mask": distance(got["wrong"], got["exact"])}
    result["plain"] = distance(got["xla"], got["exact"])
    if chosen != "xla":
        result["fused"] = distance(got[chosen], got["exact"])
        result["fused against plain"] = distance(got[chosen], got["xla"])
    errors = [result[k] for k in ("plain", "fused", "fused against plain") if k in result]
    return result | {"equal": all(e <= CLOSE for e in errors) and result["wrong mask"] >= FAR}


def _rows(lengths: tuple[int, ...], T: int, vocab: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same documents packed into one row, and each in a row of its own."""
    rng = np.random.default_rng(2)
    packed = {k: np.zeros((1, T), np.int32) for k in ("tokens", "targets", "segments", "positions")}
    packed["weights"] = np.zeros((1, T), np.float32)
    alone = {k: np.zeros((len(lengths), T), x.dtype) for k, x in packed.items()}
    start = 0
    for i, n in enumerate(lengths):
        text = rng.integers(4, vocab, n + 1)
        for batch, row, at, number in ((packed, 0, start, i + 1), (alone, i, 0, 1)):
            span = slice(at, at + n)
            batch["tokens"][row, span], batch["targets"][row, span] = text[:-1], text[1:]
            batch["segments"][row, span], batch["positions"][row, span] = number, np.arange(n)
            batch["weights"][row, span] = 1
        start += n
    return packed, alone


def packing_case(family: str, T: int, scan: bool) -> dict[str, Any]:
    """Loss and gradients of a small model over packed documents and over the same ones in rows of their own, with the
    attention that training takes here; and over the packed ones without their segments, which must differ."""
    vocab, sizes = 512, dict(layers=2, width=256, heads=4)
    module = MODELS[family]
    more = dict(positions=T) if family == "gpt2" else dict(kv_heads=2, head_width=64, ffn=512)
    c = module.Config(**dict(vocab=vocab) | sizes | more)
    lengths = (T // 3, T // 4, T // 5, T // 10)
    packed, alone = _rows(lengths, T, vocab)
    weights = spec.init(module.specs(c), jax.random.key(0))

    mixed = packed | {"segments": np.ones_like(packed["segments"]), "positions": np.arange(T, dtype=np.int32)[None]}

    def graded(weights: Any, batch: dict[str, jax.Array], dtype: str, which: str) -> Any:
        layout = Layout(execution=config.Execution(dtype=dtype, attention=which, scan=scan))  # type: ignore[arg-type]
        model = Model(module, c, module.specs(c), layout)

        def loss(weights: Any) -> jax.Array:
            out = model.forward(weights, batch)
            readout = model.readout(weights, out.x_BTD)
            return losses.cross_entropy(readout, batch["targets"], batch["weights"], shard=layout).loss / sum(lengths)

        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            return jax.value_and_grad(loss)(weights)

    @jax.jit
    def run(weights: Any, packed: Any, alone: Any, mixed: Any) -> Any:
        here = [graded(weights, batch, "bfloat16", "auto") for batch in (packed, alone, mixed)]
        return *here, graded(weights, alone, "float32", "xla")

    one, each, wrong, exact = run(weights, packed, alone, mixed)
    result = {
        "loss packed": float(one[0]), "loss unpacked": float(each[0]), "loss in float32": float(exact[0]),
        "gradients": distance(one[1], each[1]), "packed against float32": distance(one[1], exact[1]),
        "unpacked against float32": distance(each[1], exact[1]), "without segments": distance(wrong[1], each[1]),
    }  # fmt: skip
    near = abs(result["loss packed"] - result["loss unpacked"]) <= CLOSE * abs(result["loss in float32"])
    noise = max(CLOSE, 2 * result["unpacked against float32"])
    equal = near and result["gradients"] <= noise and result["packed against float32"] <= noise
    return result | {"equal": equal and result["without segments"] >= max(FAR, 3 * noise)}


def _tried(f: Any, *arguments: Any) -> dict[str, Any]:
    """A case that raises is no wrong number: it is told, and the rest goes on."""
    try:
        return f(*arguments)
    except Exception as error:
        return {"equal": None, "error": f"{type(error).__name__}: {error}"[:600]}


def check(length: int) -> dict[str, Any]:
    """All cases with rows of `length` positions. `unequal` and `raised` name those that are not as they should be."""
    fused = {name: _tried(attention_case, name, length) for name in CASES}
    packed = {"gpt2, scanned": _tried(packing_case, "gpt2", length, True)}
    packed["llama, unrolled"] = _tried(packing_case, "llama", length, False)
    choice = attention.choose("auto", Mask(True), False, None, "bfloat16")
    told = f"{choice.implementation} with plain attention and float32"
    if choice.implementation == "xla":
        told = f"plain attention with float32 only, as no fused kernel runs here ({choice.reason})"
    named = {f"attention, {n}": c for n, c in fused.items()} | {f"packing, {n}": c for n, c in packed.items()}
    return {
        "compared": told, "attention": fused, "packing": packed, "length": length,
        "unequal": [n for n, c in named.items() if c["equal"] is False],
        "raised": {n: c["error"] for n, c in named.items() if c["equal"] is None},
    }  # fmt: skip
