"""Layers in stages: the same loss and the same updated weights as on one device, whatever else the mesh splits."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config, params, sharding
from jaxlm.models import MODELS
from jaxlm.moe import Moe

B, T, S, V = 8, 16, 8, 32
SMALL = dict(vocab=V, layers=4, width=16, heads=4, ffn=32)
GROUPED = SMALL | dict(kv_heads=2, head_width=8)
EXPERTS = {name: n for name, n in GROUPED.items() if name != "ffn"} | dict(moe=Moe(experts=4, ffn=16))
MODEL = {
    "llama": GROUPED,
    "gpt2": SMALL | dict(positions=T),
    "gemma": GROUPED | dict(window=5, softcap_scores=5.0, model_type="gemma2", score_width=8),
    "olmo": GROUPED,
    "bert": SMALL | dict(positions=T, dropout=0.0),
    "modernbert": SMALL | dict(layers=5, positions=T, window=5, windowed=(False, True)),
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS | dict(window=5),
    "deepseek": dict(
        vocab=V,
        layers=5,
        dense=1,
        width=16,
        heads=4,
        plain_width=4,
        rotated_width=4,
        value_width=4,
        latent=8,
        query_rank=None,
        ffn=32,
        moe=Moe(experts=4, ffn=16, shared=16),
    ),
    "t5": SMALL | dict(head_width=4, decoder_layers=2),
    "bart": SMALL | dict(positions=T, dropout=0.0),
}


def model(family: str, **more):
    return MODELS[family].Config(**MODEL[family] | more)


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {}
    for name, length in (("", T), ("source_", S)):
        out[f"{name}segments"] = np.sort(rng.integers(1, 3, (B, length)), -1).astype(np.int32)
        out[f"{name}positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    out["source"] = rng.integers(0, V, (B, S)).astype(np.int32)
    return out | dict(tokens=rng.integers(0, V, (B, T)).astype(np.int32))


def update(family: str, mesh: config.Mesh | None, *, dropout: int | None = None, remat: str = "none", **more) -> tuple:
    """(loss, weights after a step down its gradient, compiled program)."""
    c, module = model(family, **more), MODELS[family]
    specs, devices = module.specs(c), None if mesh is None else sharding.make_mesh(mesh)
    mesh = mesh or config.Mesh()
    layout = sharding.Layout.of(mesh, config.Execution(dtype="float32", scan=True, remat=remat))  # type: ignore[arg-type]
    target_BTD = np.random.default_rng(1).standard_normal((B, T, c.width)).astype(np.float32)

    def loss(weights: dict, batch: dict) -> jax.Array:
        key = None if dropout is None else jax.random.key(dropout)
        out = module.forward(c, specs, weights, batch, shard=layout, key=key)
        error = jnp.square(out.x_BTD - layout(jnp.asarray(target_BTD), "batch", "seq", None)).mean()
        return error if out.aux_B is None else error + out.aux_B.mean()

    def step(weights: dict, batch: dict) -> tuple:
        value, grads = jax.value_and_grad(loss)(weights, batch)
        return value, jax.tree.map(lambda w, g: w - 0.3 * g, weights, grads)

    homes = layout.shardings(specs, devices)
    with sharding.on_mesh(devices):
        weights = jax.jit(partial(params.init, specs), out_shardings=homes)(jax.random.key(0))
        place = lambda x: sharding.batch_sharding(layout, devices, (1, *x.shape), x.shape[1])  # noqa: E731
        batch = {n: jax.device_put(x[None], place(x))[0] for n, x in make_batch().items()}
        run = jax.jit(step, out_shardings=(None, homes)).lower(weights, batch).compile()
        value, weights = run(weights, batch)
        return float(value), jax.device_get(weights), run


@cache
def expected(family: str, layers: int | None = None) -> tuple:
    return update(family, None, **({} if layers is None else dict(layers=layers)))[:2]


def same(got: tuple, want: tuple) -> None:
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got[1], want[1])
