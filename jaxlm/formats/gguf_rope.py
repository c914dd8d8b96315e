"""How queries and keys are turned, in GGUF's metadata and as `rope_parameters` of a config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Fields = Mapping[str, Any]
Values = dict[str, Any]
"""What stands in a config.json."""


def shortest(x: Any) -> Any:
    """A number as people wrote it: the file's float32 1e-5 is 9.999999747378752e-06 as a Python float."""
    return float(str(np.float32(x))) if isinstance(x, float) else x


def read(fields: Fields, name: str, factors: np.ndarray | None) -> Values:
    """`rope_parameters` from the metadata of architecture `name` and the file's divisors of frequencies, if any."""
    told = {k: shortest(v) for k, v in fields.items() if k.startswith(f"{name}.rope.")}
    out: Values = {"rope_type": "default", "rope_theta": told.get(f"{name}.rope.freq_base", 10000.0)}
    scaling = f"{name}.rope.scaling."
    kind = told.get(scaling + "type", "none")
    known = {"type", "factor", "original_context_length", "finetuned"}
    known |= {"yarn_beta_fast", "yarn_beta_slow"} if kind == "yarn" else set()
    odd = {k for k in told if k.startswith(scaling)} - {scaling + k for k in known}
    odd = {k for k in odd if not (k.endswith("attn_factor") and told[k] == 1)}
    if odd or kind not in ("none", "linear", "yarn") or (kind != "none" and factors is not None):
        raise ValueError(f"{scaling}type {kind!r}{' with ' + ', '.join(sorted(odd)) if odd else ''} is not read")
    if factors is not None:
        return out | _fit_llama3(factors, out["rope_theta"], told.get(scaling + "original_context_length", 8192))
    if kind != "none":
        out |= {"rope_type": kind, "factor": told[scaling + "factor"]}
    if kind == "yarn":
        out["original_max_position_embeddings"] = told[scaling + "original_context_length"]
        out |= {k: told[scaling + "yarn_" + k] for k in ("beta_fast", "beta_slow") if scaling + "yarn_" + k in told}
    return out


def plain(theta: float, width: int) -> np.ndarray:
    """Radians a position, of a head of this width."""
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def divisors(frequencies: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    """What Llama 3.1's stretching divides the plain frequencies by."""
    turns = p["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    keep = (turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
    keep = np.clip(keep, 0, 1)
    return 1 / ((1 - keep) / p["factor"] + keep)


def _fit_llama3(factors: np.ndarray, theta: float, trained: int) -> Values:
    """What gave these divisors; `trained` is a guess.

    Only trained / low and trained / high count, so low is 1, as in every published model.
    """
    factors = factors.astype(np.float64).reshape(-1)
    frequencies, most = plain(theta, 2 * len(factors)), float(np.max(factors))
    usual = {
        "factor": most,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": trained,
    }
    tried = [usual]
    between = (factors > 1 + 1e-4) & (factors < most * (1 - 1e-4))
    if between.sum() >= 2:
        keep = (1 / factors[between] - 1 / most) / (1 - 1 / most)
        slope, start = np.polyfit(frequencies[between], keep, 1)
        high = 1 - 1 / start
        trained = round(slope * 2 * np.pi * (high - 1))
        tried.append(usual | {"high_freq_factor": round(high, 3), "original_max_position_embeddings": trained})
    for p in tried:
        if np.allclose(divisors(frequencies, p), factors, rtol=1e-4):
            return {"rope_type": "llama3"} | p
    raise ValueError("rope_freqs.weight: divisors of frequencies of another form than Llama 3's are not read")


def write(p: Mapping[str, Any], width: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """The inverse, for heads of `width`: fields after the architecture's name, and divisors where there are some."""
    fields: dict[str, Any] = {"rope.freq_base": float(p["rope_theta"])}
    kind = p.get("rope_type", "default")
    if kind == "llama3":
        fields["rope.scaling.original_context_length"] = p["original_max_position_embeddings"]
        return fields, divisors(plain(p["rope_theta"], width), p).astype(np.float32)
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(p["factor"])}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = p["original_max_position_embeddings"]
        fields |= {f"rope.scaling.yarn_{k}": float(p[k]) for k in ("beta_fast", "beta_slow") if k in p}
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"gguf: rope_type {kind!r} has no form in the file")
    return fields, None
