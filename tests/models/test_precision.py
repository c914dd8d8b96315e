"""Gradients in bfloat16 are those of float32 but for the noise of rounded activations: for every family and adapter,
biases and other vectors too, which add up over thousands of tokens. With products in few bits they are those of
bfloat16 but for more of that noise.

As a program it prints the table of errors.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.adapted_models import shaken

from jaxlm.core import config, spec, tree
from jaxlm.models import MODELS, bart, bert, deepseek, gemma, gpt2, gpt_oss, llama, mixtral, modernbert, olmo, t5
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.weights.adapters import METHODS
from jaxlm.weights.adapters.adapted import Adapted

SIZES = dict(vocab=64, layers=2, width=32, heads=4)
GROUPED = SIZES | dict(kv_heads=2, head_width=8)
EXPERTS = Moe(experts=4, top_k=2, ffn=32)
CONFIGS = {
    "llama": llama.Config(**GROUPED, ffn=64, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True),
    "gpt2": gpt2.Config(**SIZES, ffn=64, positions=128),
    "gemma": gemma.Config(**GROUPED, ffn=64, score_width=8, softcap_logits=30.0, bias=True),
    "olmo": olmo.Config(**GROUPED | dict(kv_heads=4), ffn=64, bias=True),
    "bert": bert.Config(**SIZES, ffn=64, positions=128, dropout=0.0, eps=1e-5),
    "modernbert": modernbert.Config(
        **SIZES, ffn=64, positions=128, norm_bias=True, attention_bias=True, mlp_bias=True, transform_bias=True
    ),
    "t5": t5.Config(**SIZES, head_width=8, ffn=64, scaled=True),
    "bart": bart.Config(**SIZES, ffn=64, positions=128, scaled=True, dropout=0.0),
    "mixtral": mixtral.Config(**GROUPED, moe=EXPERTS, qkvo_bias=True),
    "gpt_oss": gpt_oss.Config(**GROUPED, moe=EXPERTS),
    "deepseek": deepseek.Config(
        **SIZES, ffn=64, plain_width=8, rotated_width=8, value_width=8, latent=16, query_rank=16, attention_bias=True,
        moe=dataclasses.replace(EXPERTS, shared=32, score="sigmoid", selection_bias=True),
    ),
}  # fmt: skip
ADAPTERS = {
    name: METHODS[name].Config(**more)
    for name, more in {
        "lora": dict(rank=4, targets=("all",)), "dora": dict(rank=4, targets=("all",)),
        "pissa": dict(rank=4, targets=("all",)), "adalora": dict(rank=4, targets=("all",)),
        "vera": dict(rank=16, targets=("all",)), "ia3": dict(targets=("all",)), "houlsby": dict(reduction=4.0),
        "pfeiffer": dict(reduction=4.0), "parallel": dict(reduction=4.0), "prefix": dict(tokens=4),
        "prompt": dict(tokens=4), "p_tuning": dict(tokens=4), "bitfit": {}, "norms": {},
        "orthogonal_lora": dict(rank=4, previous=4, targets=("all",)),
    }.items()
}  # fmt: skip
CASES = [*((name, "none") for name in CONFIGS), *(("gpt2", name) for name in ADAPTERS)]
ROWS, LENGTH = 32, 64


def model_of(family: str, adapter: str, dtype: str, matmul: str = "dtype") -> Model:
    c = CONFIGS[family]
    adapted = Adapted(ADAPTERS.get(adapter, config.Adapter()), MODELS[family], c)
    return Model(
        MODELS[family], c, adapted.base, Layout(execution=config.Execution(dtype=dtype, matmul=matmul)), adapted
    )


def weights_of(model: Model) -> dict:
    """Numbers that bfloat16 has, so that all that differs is what is computed with them."""
    rng = np.random.default_rng(0)

    def one(s: spec.Spec) -> jax.Array:
        size = {"norm": 0.2, "table": 0.5}.get(s.role, 0.1)
        return jnp.asarray(rng.normal(0, size, s.shape) + (s.role == "norm"), jnp.float32)

    base = jax.tree.map(one, model.specs, is_leaf=spec.is_spec)
    made = model.adapter.init(model.adapter.specs(), jax.random.key(0), None, base)
    made = shaken(model.adapter, made) if model.adapter.changes else made
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), made)


def batch_of(model: Model) -> dict:
    rng = np.random.default_rng(1)
    draw = lambda: rng.integers(4, model.config.vocab, (ROWS, LENGTH)).astype(np.int32)  # noqa: E731
    count, ones = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)), np.ones((ROWS, LENGTH), np.int32)
    batch = dict(tokens=draw(), positions=count, segments=ones)
    if model.family.kind == "encoder_decoder":
        batch |= dict(source=draw(), source_positions=count, source_segments=ones)
    return batch


@functools.cache
def gradients(family: str, adapter: str, dtype: str, matmul: str = "dtype") -> dict[str, np.ndarray]:
    """Gradients of what is trained, by path."""
    model = model_of(family, adapter, dtype, matmul)
    weights, batch = weights_of(model), batch_of(model)
    trained, frozen = tree.partition(weights, model.adapter.trainable)

    def loss(trained: dict) -> jax.Array:
        w = tree.merge(trained, frozen)
        out = model.forward(w, batch)
        targets = jnp.asarray((batch["tokens"] * 7 + 3) % model.config.vocab)
        readout = model.readout(w, out.x_BTD)
        sums = losses.cross_entropy(readout, targets, jnp.ones(targets.shape, jnp.float32), shard=model.shard)
        return sums.loss / targets.size

    found = jax.jit(jax.grad(loss))(trained)
    return {path: np.asarray(g, np.float64) for path, g in tree.flatten(found).items()}


def errors(family: str, adapter: str, matmul: str = "dtype") -> dict[str, float]:
    """Of each weight, by path, the distance of its two gradients over the length of the exact one."""
    exact, rough = gradients(family, adapter, "float32"), gradients(family, adapter, "bfloat16", matmul)
    longest = max(np.linalg.norm(g) for g in exact.values())
    return {
        path: float(np.linalg.norm(rough[path] - g) / np.linalg.norm(g))
        for path, g in exact.items()
        if np.linalg.norm(g) > 1e-3 * longest and not path.endswith("selection_bias")  # which is no gradient
    }


USUAL = (("gpt2", "none"), ("gpt2", "ia3"))


@pytest.mark.parametrize(
    ("family", "adapter"), [c if c in USUAL else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_gradients_in_bfloat16_are_those_in_float32(family, adapter):
    found = errors(family, adapter)
    assert found and {path: error for path, error in found.items() if error > 0.03} == {}


@pytest.mark.parametrize(
    ("family", "adapter"), [c if c in USUAL else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_gradients_with_products_in_fp8_are_close_to_those_in_float32(family, adapter):
    check_few_bits(family, adapter, "fp8", 0.3)


@pytest.mark.parametrize(("matmul", "most"), [("mxfp8", 0.3), ("int8", 0.3)])
@pytest.mark.parametrize(
    ("family", "adapter"), [pytest.param(*c, marks=[] if c == USUAL[0] else pytest.mark.slow) for c in CASES]
)
def test_gradients_with_products_in_mxfp8_and_int8_are_close_to_those_in_float32(family, adapter, matmul, most):
    check_few_bits(family, adapter, matmul, most)


def check_few_bits(family: str, adapter: str, matmul: str, most: float) -> None:
    found = errors(family, adapter, matmul)
    assert found and {path: error for path, error in found.items() if error > most} == {}
    assert max(found.values()) > 2 * max(errors(family, adapter).values())  # its products are no others'


def main() -> None:
    for (family, adapter), matmul in itertools.product(CASES, ("dtype", "fp8", "mxfp8", "int8")):
        found = errors(family, adapter, matmul)
        specs = tree.flatten(model_of(family, adapter, "float32").adapter.specs(), spec.is_spec)
        for kind, is_kind in (("matrices", False), ("vectors", True)):
            some = {path: e for path, e in found.items() if specs[path].is_vector == is_kind}
            if some:
                worst = max(some, key=lambda path: some[path])
                middle = float(np.median(list(some.values())))
                print(
                    f"{family:11} {adapter:9} {kind:9} median {middle:.2%} worst {some[worst]:.2%} {worst}", flush=True
                )


if __name__ == "__main__":
    main()
