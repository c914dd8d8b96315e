"""Models of a few units each, of several families, whose sizes change: with random weights, as pure functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import config, spec, tree
from jaxlm.models import MODELS
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.weights.grow import width

ONE = dict(vocab=11, layers=2, width=8, heads=2, ffn=12)
GEMMA = ONE | dict(head_width=4, kv_heads=1, score_width=4, model_type="gemma2", window=2)
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", ONE | dict(heads=4, kv_heads=2, head_width=4)),
    "llama_tied": ("llama", ONE | dict(kv_heads=1, head_width=4, tied=True)),
    "smollm3": ("llama", ONE | dict(kv_heads=1, head_width=4, rotated=(True, False), window=2, windowed=(False, True))),
    "gpt2": ("gpt2", ONE | dict(positions=8)),
    "gemma2": ("gemma", GEMMA),
    "llama_wide": ("llama", ONE | dict(heads=6, kv_heads=2, head_width=4)),
    "olmo_grouped": ("olmo", ONE | dict(kv_heads=1, head_width=4)),
    "olmo": ("olmo", ONE | dict(kv_heads=2, head_width=4)),
    "bert": ("bert", ONE | dict(positions=8, pooler=False)),
    "modernbert": ("modernbert", ONE | dict(positions=8, layers=4)),
    "t5": ("t5", ONE | dict(head_width=4, decoder_layers=1)),
    "mbart": ("bart", ONE | dict(positions=8, norm_first=True)),
    "deepseek": ("deepseek", ONE | dict(plain_width=4, rotated_width=4, value_width=4, latent=4, layers=4, dense=2,
                                        moe=Moe(experts=4, top_k=2, ffn=12, balance=0.0))),
}  # fmt: skip


class Tiny(NamedTuple):
    model: Model
    weights: Any


def model_of(family: Any, c: Any) -> Model:
    layout = Layout.of(config.Mesh(), config.Execution(dtype="float32", attention="xla"))
    return Model(family, c, family.specs(c), layout)


@functools.cache
def tiny(name: str) -> Tiny:
    """A model whose weights have no special values: norms and biases too are random."""
    family, sizes = SIZES[name]
    model = model_of(MODELS[family], MODELS[family].Config(**sizes))
    rng = np.random.default_rng(0)

    def one(s: spec.Spec) -> np.ndarray:
        norm = s.role == "norm" and not family.startswith("gemma")
        return (rng.standard_normal(s.shape) / 5 + norm).astype(np.float32)

    return Tiny(model, jax.tree.map(one, model.specs, is_leaf=spec.is_spec))


def batch_of(model: Model) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, 11, (2, 6)).astype(np.int32)
    out = dict(
        tokens=tokens, positions=np.tile(np.arange(6, dtype=np.int32), (2, 1)), segments=np.ones((2, 6), np.int32)
    )
    if model.family.kind == "encoder_decoder":
        out |= dict(source=tokens[:, ::-1].copy(), source_positions=out["positions"], source_segments=out["segments"])
    return out


def run(model: Model, weights: Any) -> tuple[np.ndarray, dict[str, np.ndarray], Callable[[Any], Any]]:
    """Returns the logits, the gradients by path, and the function that gives both for other weights."""
    batch, goal = batch_of(model), jnp.asarray(np.random.default_rng(2).integers(0, 11, (2, 6)))

    @jax.jit
    def both(weights: Any) -> Any:
        def loss(weights: Any) -> Any:
            out = model.forward(weights, batch)
            logits = losses.logits(model.readout(weights, out.x_BTD), model.shard)
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), goal[..., None], -1)
            return -picked.mean() + (0 if out.aux_B is None else out.aux_B.mean()), logits

        return jax.grad(loss, has_aux=True)(weights)

    with jax.default_matmul_precision("highest"):
        grads, logits = both(weights)
    return np.asarray(logits), {p: np.asarray(g) for p, g in tree.flatten(grads).items()}, both


def widened(name: str, noise: float = 0.0, **sizes: int) -> Tiny:
    model, weights = tiny(name)
    c, old = dataclasses.replace(model.config, **sizes), model.specs
    larger = model_of(model.family, c)
    if c.width != model.config.width and "head" not in old:
        larger = model_of(model.family, dataclasses.replace(c, tied=False))
        old, weights = width.with_own_head(old, larger.specs, weights)
    return Tiny(larger, width.widened(old, larger.specs, weights, (model.config.width, c.width), noise))
