"""Implements rotary position embedding (Su et al. 2021) with every published way to stretch it to longer sequences.

B batch, T position, H heads, C head width, R = rotated width / 2.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.published_config import PublishedConfig
from jaxlm.core.ranges import Natural, NonNegative, Positive, Share


@dataclass(frozen=True)
class Rope:
    """A Rope gives the frequencies of the rotation. Fields that its scaling doesn't use stay at their defaults."""

    theta: Positive = 1e4
    share: Share = 1.0
    """Part of each head's width that is rotated."""
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: Positive = 1.0
    """How many times longer than `trained` a sequence may be."""
    trained: Natural = 0
    """Longest sequence before stretching (dynamic, llama3, yarn, longrope)."""
    low_freq_factor: Positive = 1.0
    """llama3: wavelengths above trained / this are stretched in full."""
    high_freq_factor: Positive = 4.0
    """llama3: wavelengths below trained / this are left alone."""
    beta_fast: Positive = 32.0
    """yarn: rotations within `trained` from which a frequency is left alone."""
    beta_slow: Positive = 1.0
    """yarn: rotations below which a frequency is stretched in full."""
    truncate: bool = True
    """yarn: round the borders of the ramp to whole dimensions."""
    mscale: NonNegative = 0.0
    """yarn, DeepSeek: temperature of the rotated part; 0: unused."""
    mscale_all_dim: NonNegative = 0.0
    """yarn, DeepSeek: temperature of the whole score; 0: unused."""
    attention_factor: Positive | None = None
    """yarn, longrope: what sine and cosine are multiplied by; None: the method's own formula."""
    short_factor: tuple[Positive, ...] = ()
    """longrope: divisor of each frequency in sequences up to `trained`."""
    long_factor: tuple[Positive, ...] = ()
    """longrope: divisor of each frequency in longer ones."""


def temperature(factor: float, mscale: float = 1.0) -> float:
    """Returns YaRN's 0.1 · m · ln s + 1 (Peng et al. 2023, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def check(rope: Rope, width: int, name: str = "head_width") -> None:
    """Raises a ValueError, which names `model.{name}`, where heads of this width can't be rotated so."""
    rotated = int(width * rope.share)
    if rotated % 2 or rotated < (4 if rope.scaling == "dynamic" else 2):
        raise ValueError(f"model.{name}: {rotated} of {width} values would be rotated, in pairs; choose an even number")
    for field in ("short_factor", "long_factor") if rope.scaling == "longrope" else ():
        if len(getattr(rope, field)) != rotated // 2:
            raise ValueError(
                f"model.rope.{field}: {len(getattr(rope, field))} divisors for {rotated // 2} frequencies; give as many"
            )


def table(rope: Rope, width: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (sine, cosine), `[B, T, R]` in float32, for heads of `width`."""
    rotated = int(width * rope.share)
    length = positions_BT.max() + 1 if rope.scaling in ("dynamic", "longrope") else None
    angle_BTR = positions_BT[..., None].astype(jnp.float32) * _frequencies(rope, rotated, length)[None, None]
    scale = _attention_factor(rope)
    return jnp.sin(angle_BTR) * scale, jnp.cos(angle_BTR) * scale


def rotate(x_BTHC: jax.Array, sin_cos: tuple[jax.Array, jax.Array], interleaved: bool = False) -> jax.Array:
    """Turns pairs of a head's first 2·R values, and passes the rest.

    Pairs are (i, i + R), or (2i, 2i + 1) if `interleaved` (DeepSeek). The latter come out as halves too: a permutation
    that queries and keys share changes no score.
    """
    sin_BTR, cos_BTR = (a[:, :, None] for a in sin_cos)
    n = 2 * sin_BTR.shape[-1]
    x = x_BTHC[..., :n].astype(jnp.float32)
    x1, x2 = (x[..., ::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, -1)
    out = jnp.concatenate([x1 * cos_BTR - x2 * sin_BTR, x2 * cos_BTR + x1 * sin_BTR], -1).astype(x_BTHC.dtype)
    return out if n == x_BTHC.shape[-1] else jnp.concatenate([out, x_BTHC[..., n:]], -1)


def _attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling == "yarn":
        if rope.mscale and rope.mscale_all_dim:
            return temperature(rope.factor, rope.mscale) / temperature(rope.factor, rope.mscale_all_dim)
        return temperature(rope.factor)
    if rope.scaling == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.trained))
    return 1.0


def _frequencies(rope: Rope, rotated: int, length: jax.Array | None) -> Any:
    """Returns radians a position, `[R]`. The `length` of the longest sequence matters to dynamic and longrope alone."""
    exponent_R = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    plain_R = (1.0 / np.float32(rope.theta) ** exponent_R).astype(np.float32)
    if rope.scaling == "linear":
        return plain_R / np.float32(rope.factor)
    if rope.scaling == "dynamic":
        assert length is not None
        longest = jnp.maximum(length, rope.trained).astype(jnp.float32)
        stretch = rope.factor * longest / rope.trained - (rope.factor - 1)
        theta = rope.theta * stretch ** (rotated / (rotated - 2))
        return 1.0 / theta ** jnp.asarray(exponent_R)
    if rope.scaling == "llama3":
        wavelength_R = 2 * np.pi / plain_R
        low, high = rope.trained / rope.low_freq_factor, rope.trained / rope.high_freq_factor
        keep_R = (rope.trained / wavelength_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        mixed_R = (1 - keep_R) * plain_R / rope.factor + keep_R * plain_R
        out_R = np.where(wavelength_R > low, plain_R / rope.factor, np.where(wavelength_R < high, plain_R, mixed_R))
        return out_R.astype(np.float32)
    if rope.scaling == "yarn":
        return _yarn(rope, rotated, plain_R)
    if rope.scaling == "longrope":
        assert length is not None
        short_R, long_R = (plain_R / np.asarray(f, np.float32) for f in (rope.short_factor, rope.long_factor))
        return jnp.where(length > rope.trained, long_R, short_R)
    return plain_R


def _yarn(rope: Rope, rotated: int, plain_R: np.ndarray) -> np.ndarray:
    """Scales frequencies by NTK-by-parts (Peng et al. 2023, section 3.2)."""

    def dimension(rotations: float) -> float:
        return rotated * math.log(rope.trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp_R = np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (plain_R / rope.factor * ramp_R + plain_R * (1 - ramp_R)).astype(np.float32)


# The fields that each scaling uses, by its name in published files.
SCALED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}


def from_hf(
    values: dict[str, Any], theta: float, parameters: dict[str, Any] | None = None, partial: bool = False
) -> Rope:
    """Reads a Rope from a `config.json`: today's `rope_parameters`, or `rope_theta` with `rope_scaling`.

    `theta` is the default. `parameters` replaces the file's own where they are nested by layer type. Only `partial`
    models rotate a part of each head; in the files of others transformers leaves `partial_rotary_factor` unread. Raises
    ValueError for a kind or parameter that it doesn't know.
    """
    own = values.get("rope_scaling") or values.get("rope_parameters") or {}  # transformers' order
    p = PublishedConfig(parameters or own, "config.json: rope_parameters")
    kind: Any = p.pop("rope_type", None) or p.pop("type", None) or "default"
    p.pop("type", None)
    kind = {"su": "longrope", "ntk": "dynamic"}.get(kind, kind)
    if kind != "default" and kind not in SCALED:
        raise ValueError(f"config.json: rope_type {kind!r} is unknown; known: default, {', '.join(SCALED)}")
    longest = values.get("max_position_embeddings") or 0
    # Phi-3 writes the trained length beside the scaling, others inside it; dynamic NTK counts from the longest.
    trained = p.pop("original_max_position_embeddings", None) or values.get("original_max_position_embeddings")
    if kind == "dynamic":
        trained = longest
    theta = p.pop("rope_theta", None) or values.get("rope_theta") or theta
    share = p.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
    if not partial:
        if kind != "default" and share != 1:
            named = f"partial_rotary_factor {share!r} with rope_type {kind!r}"
            raise ValueError(f"config.json: {named} is not what a {values.get('model_type')} can have; leave it out")
        share = 1.0
    unknown = p.keys() - set(SCALED.get(kind, ())) - {"finetuned", "max_position_embeddings"}
    if unknown and kind != "default":
        raise ValueError(f"config.json: rope_parameters of {kind} have unknown {', '.join(sorted(unknown))}")
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v := p[k], list) else v for k in p if k in SCALED.get(kind, ()) and p[k] is not None
    }
    if kind not in ("default", "linear"):
        fields["trained"] = trained or longest
        if not fields["trained"]:
            raise ValueError(f"config.json: rope_type {kind!r} needs max_position_embeddings")
    if kind in ("yarn", "longrope") and "factor" not in fields:
        fields["factor"] = longest / fields["trained"]
    rope = Rope(theta=float(theta), share=float(share), scaling=kind, **fields)
    if kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ValueError(f"config.json: high_freq_factor {rope.high_freq_factor} must be above low_freq_factor")
    if kind == "yarn" and rope.theta <= 1:
        raise ValueError(f"config.json: rope_theta {theta} must be above 1 for yarn")
    return rope


def to_hf(rope: Rope, partial: bool = False) -> dict[str, Any]:
    """Returns `rope_parameters` as today's `config.json` has them. ValueError: not the whole head is rotated, which
    only `partial` models' files say."""
    out: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.share != 1 and not partial:
        raise ValueError(f"model.rope.share: {rope.share} is not in files of this model_type; set 1, or phi3")
    if rope.share != 1:
        out["partial_rotary_factor"] = rope.share
    for name in SCALED.get(rope.scaling, ()):
        value = getattr(rope, name)
        if value is not None and not (name in ("mscale", "mscale_all_dim") and not value):
            out[name] = list(value) if isinstance(value, tuple) else value
    if rope.scaling in ("llama3", "yarn", "longrope"):
        out["original_max_position_embeddings"] = rope.trained
    return out
