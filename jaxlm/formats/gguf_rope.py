"""Settings of rotary position embeddings stand in GGUF's metadata and as `rope_parameters` in a config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.formats.gguf_metadata import Metadata

Fields = Mapping[str, Any]
Values = dict[str, Any]
"""Values are the content of a config.json."""


def shortest(x: Any) -> Any:
    """Returns a number as people wrote it: the file's float32 1e-5 is 9.999999747378752e-06 as a Python float."""
    with np.errstate(over="ignore"):  # what is beyond float32 is refused where it is read
        return float(str(np.float32(x))) if isinstance(x, float) else x


def read(fields: Fields, name: str, factors: np.ndarray | None) -> Values:
    """Returns `rope_parameters` by the metadata of architecture `name` and the file's divisors of frequencies, if any.

    Raises a ValueError where the scaling is of a kind that is not read.
    """
    rope_fields = Metadata({k: shortest(v) for k, v in fields.items() if k.startswith(f"{name}.rope.")})
    out: Values = {"rope_type": "default", "rope_theta": rope_fields.get(f"{name}.rope.freq_base", 10000.0)}
    scaling = f"{name}.rope.scaling."
    kind = rope_fields.get(scaling + "type", "none")
    known = {"type", "factor", "original_context_length", "finetuned"}
    known |= {"yarn_beta_fast", "yarn_beta_slow"} if kind == "yarn" else set()
    unknown = {k for k in rope_fields if k.startswith(scaling)} - {scaling + k for k in known}
    unknown = {k for k in unknown if not (k.endswith("attn_factor") and rope_fields[k] == 1)}
    if unknown or kind not in ("none", "linear", "yarn") or (kind != "none" and factors is not None):
        raise ValueError(
            f"{scaling}type {kind!r}{' with ' + ', '.join(sorted(unknown)) if unknown else ''} is not read"
        )
    if factors is not None:
        return out | _fit_llama3(factors, out["rope_theta"], rope_fields.get(scaling + "original_context_length", 8192))
    if kind != "none":
        out |= {"rope_type": kind, "factor": rope_fields[scaling + "factor"]}
    if kind == "yarn":
        out["original_max_position_embeddings"] = rope_fields[scaling + "original_context_length"]
        out |= {
            k: rope_fields[scaling + "yarn_" + k]
            for k in ("beta_fast", "beta_slow")
            if scaling + "yarn_" + k in rope_fields
        }
    return out


def plain(theta: float, width: int) -> np.ndarray:
    """Returns the frequencies, radians a position, of a head of this width, `[width / 2]`."""
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def divisors(frequencies: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    """Returns what the plain frequencies are divided by to stretch them as in Llama 3.1."""
    turns = p["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    share = (turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
    share = np.clip(share, 0, 1)
    return 1 / ((1 - share) / p["factor"] + share)


def _fit_llama3(factors: np.ndarray, theta: float, trained: int) -> Values:
    """Finds the settings that gave these divisors; `trained` is a first guess of the length in training.

    Only trained / low and trained / high count, so low is 1, as in every published model.
    """
    factors = factors.astype(np.float64).reshape(-1)
    frequencies, largest = plain(theta, 2 * len(factors)), float(np.max(factors))
    usual = {
        "factor": largest,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": trained,
    }
    candidates = [usual]
    between = (factors > 1 + 1e-4) & (factors < largest * (1 - 1e-4))
    if between.sum() >= 2:
        share = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
        slope, start = np.polyfit(frequencies[between], share, 1)
        high = 1 - 1 / start
        trained = round(slope * 2 * np.pi * (high - 1))
        candidates.append(usual | {"high_freq_factor": round(high, 3), "original_max_position_embeddings": trained})
    for p in candidates:
        if np.allclose(divisors(frequencies, p), factors, rtol=1e-4):
            return {"rope_type": "llama3"} | p
    raise ValueError("rope_freqs.weight: divisors of frequencies of another form than Llama 3's are not read")


def write(p: Mapping[str, Any], width: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns (fields after the architecture's name, divisors or None) for heads of `width`: the inverse of `read`."""
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
