"""Trains a Flax nnx module of one's own with everything that a model of the package has: packing, meshes, checkpoints.

python examples/own_model_nnx.py
python -m jaxlm --plugin examples/own_model_nnx.py generate runs/own_nnx --prompt "import "
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import jaxlm
from jaxlm.nn.family import ModelConfig
from jaxlm.objectives import causal

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config(ModelConfig):
    vocab: int = 384
    layers: int = 2
    width: int = 32
    heads: int = 4
    positions: int = 128
    tied: bool = False


class Decoder(nnx.Module):
    """A small Transformer in plain nnx; it takes segments, so documents of a packed row stay apart."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, dtype: Any) -> None:
        norm = lambda: nnx.RMSNorm(c.width, dtype=dtype, rngs=rngs)  # noqa: E731
        self.embed = nnx.Embed(c.vocab, c.width, dtype=dtype, rngs=rngs)
        self.place = nnx.Embed(c.positions, c.width, dtype=dtype, rngs=rngs)
        layers = range(c.layers)
        self.norm1, self.norm2 = nnx.List([norm() for _ in layers]), nnx.List([norm() for _ in layers])
        self.attention = nnx.List(
            [nnx.MultiHeadAttention(c.heads, c.width, dtype=dtype, decode=False, rngs=rngs) for _ in layers]
        )
        self.up = nnx.List([nnx.Linear(c.width, 4 * c.width, dtype=dtype, rngs=rngs) for _ in layers])
        self.down = nnx.List([nnx.Linear(4 * c.width, c.width, dtype=dtype, rngs=rngs) for _ in layers])
        self.norm, self.head = norm(), nnx.Linear(c.width, c.vocab, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place(positions)
        same_document = nnx.make_attention_mask(segments, segments, lambda a, b: a == b)
        mask = nnx.combine_masks(same_document, nnx.make_causal_mask(tokens))
        for norm1, attention, norm2, up, down in zip(
            self.norm1, self.attention, self.norm2, self.up, self.down, strict=True
        ):
            x = x + attention(norm1(x), mask=mask)
            x = x + down(nnx.gelu(up(norm2(x))))
        return self.head(self.norm(x))


jaxlm.register_model("own_nnx", jaxlm.from_nnx(Decoder, Config))


def main(out: str = "runs", steps: int = 30) -> jaxlm.RunDirectory:
    base = jaxlm.load("tiny_llama", name="own_nnx", out=out, train={"steps": steps, "seq_len": 64, "prompts": ()})
    data = {"train": (str(HERE),), "holdout": 0.3, "cache": f"{out}/cache", "tokenize_workers": 1}
    run = jaxlm.load(base, model=Config(), objective=causal.Config(), data=data, optim={"warmup": 2})
    folder = jaxlm.train(run)
    print("goes on:", repr(folder.open().generate("import ", tokens=8)))
    return folder


if __name__ == "__main__":
    main()
