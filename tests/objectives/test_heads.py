"""Heads of tasks give float32 logits whatever the model computes in."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.layers import Output
from jaxlm.nn.layout import Layout
from jaxlm.objectives import answer, choice, classify, next_sentence, relate, tag

B, T, D = 256, 2, 64
BATCH = dict(
    tokens=np.zeros((B, T), np.int32), types=np.zeros((B, T), np.int32), segments=np.ones((B, T), np.int32),
    positions=np.zeros((B, T), np.int32), at=np.zeros(B, np.int32), rows=np.ones(B, np.float32),
)  # fmt: skip


def model() -> SimpleNamespace:
    """Stands for a model in bfloat16 whose texts differ little."""
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(1 + 0.02 * rng.standard_normal((B, T, D)), jnp.bfloat16)
    return SimpleNamespace(
        config=SimpleNamespace(types=0, mean_pooling=False, task_layer=None), shard=Layout(),
        forward=lambda params, batch, key=None: Output(x_BTD), task_states=lambda params, x_BTD: x_BTD,
        pooled=lambda params, x_BTD: x_BTD[:, 0],
    )  # fmt: skip


def of_classify(params):
    return classify.logits(classify.Config(kind="regression"), model(), params, BATCH, None)[0]


def of_relate(params):
    return relate.logits(relate.Config(), model(), params, BATCH | {"at": np.zeros((B, 2), np.int32)}, None)[0]


def of_choice(params):
    each = {name: x.reshape(B // 2, 2, *x.shape[1:]) for name, x in BATCH.items()}
    return choice.logits(choice.Config(), model(), params, each | {"choice_mask": np.ones((B // 2, 2))}, None)[0]


def of_tag(params):
    return tag.logits(tag.Config(), model(), params, BATCH, None)[0]


def of_answer(params):
    return answer.logits(answer.Config(), model(), params, BATCH | {"allowed": np.ones((B, T))}, None)[0]


def of_next_sentence(params):
    """The loss of each pair, which is what its weight adds to the sum."""
    c, batch = next_sentence.Config(masked_too=False), BATCH | {"is_next": np.ones(B, np.int32)}
    return jax.grad(lambda rows: next_sentence.loss(c, model(), params, batch | {"rows": rows}, None)["pairs"]["loss"])(
        jnp.asarray(BATCH["rows"])
    )


@pytest.mark.parametrize(("of", "name", "ins", "outs"), [
    (of_classify, "classify", D, 1), (of_relate, "relate", 2 * D, 3), (of_choice, "choice", D, 1),
    (of_tag, "tag", D, 3), (of_answer, "answer", D, 2), (of_next_sentence, "next_sentence", D, 2),
])  # fmt: skip
def test_logits_are_not_rounded(of, name, ins, outs):
    """In bfloat16 all these texts would have the same few numbers: of 256 regressions, 76."""
    w = np.random.default_rng(1).standard_normal((ins, outs)).astype(np.float32)
    z = np.asarray(of({name: jnp.asarray(w), f"{name}_bias": jnp.zeros(outs)}))
    assert z.dtype == np.float32 and len(np.unique(z)) > 0.95 * z.size
