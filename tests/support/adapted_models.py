"""Small models of three kinds, with what they read."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import config, tree
from jaxlm.models import MODELS, bart, bert, gpt2, llama, t5
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.weights.adapters.adapted import Adapted

CONFIGS = {
    "llama": llama.Config(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_width=8, ffn=64),
    "bert": bert.Config(vocab=64, layers=2, width=32, heads=4, ffn=64, positions=64, dropout=0.0),
    "gpt2": gpt2.Config(vocab=64, layers=2, width=32, heads=4, ffn=64, positions=64),
    "bart": bart.Config(vocab=64, layers=2, width=32, heads=4, ffn=64, positions=64, dropout=0.0),
    "t5": t5.Config(vocab=64, layers=2, width=32, heads=4, head_width=8, ffn=64, decoder_start=0, dropout=0.0),
}
ONE = config.Mesh()


def batch_of(name: str, rows: int = 4, length: int = 16) -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(3), (rows, length), 1, 64)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    ones = jnp.ones_like(tokens)
    batch = dict(tokens=tokens, positions=positions, segments=ones)
    if MODELS[name].kind == "encoder_decoder":
        batch |= dict(source=tokens[:, ::-1], source_positions=positions, source_segments=ones)
    return batch


def make(name: str, c: config.Adapter, mesh: config.Mesh = ONE, **execution) -> Model:
    family, model = MODELS[name], CONFIGS[name]
    adapted = Adapted(c, family, model)
    layout = Layout.of(mesh, config.Execution(**{"dtype": "float32"} | execution))
    return Model(family, model, adapted.base, layout, adapted)


def shaken(adapter: Adapted, params, size: float = 0.1):
    """With every number that is trained moved at random: a fresh adapter does nothing."""
    rng = np.random.default_rng(100)

    def one(path, x):
        moves = adapter.trainable(path)
        return x + np.float32(size) * rng.standard_normal(x.shape, np.float32) if moves else x

    return tree.map_named(one, params)


def logits(model: Model, params, batch) -> jax.Array:
    return losses.logits(model.readout(params, model.forward(params, batch).x_BTD), model.shard)
