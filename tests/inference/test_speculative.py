"""Speculative decoding: the same greedy text, the same distribution, in fewer calls of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.inference.speculative import Speculative
from jaxlm.models import gpt2, llama
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout

TARGET = llama.Config(vocab=32, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=32)
DRAFT = llama.Config(vocab=32, layers=1, width=8, heads=1, kv_heads=1, head_width=8, ffn=16)
PROMPTS = [[1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [9], [30, 31]]


def opened(c, seed: int = 0, scale: float = 1 / 3) -> tuple[Generator, dict]:
    layout = Layout.of(config.Mesh(), config.Execution(dtype="float32", scan=True))
    specs, rng = llama.specs(c), np.random.default_rng(seed)
    make = lambda s: rng.standard_normal(s.shape).astype(np.float32) * scale  # noqa: E731
    weights = jax.tree.map(make, specs, is_leaf=spec.is_spec)
    return Generator(Model(llama, c, specs, layout), [7]), weights


WINDOWED = dataclasses.replace(TARGET, window=5, windowed=(True, False))


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        pytest.param(TARGET, DRAFT, marks=pytest.mark.slow),
        pytest.param(TARGET, None, marks=pytest.mark.slow),
        (WINDOWED, dataclasses.replace(DRAFT, window=4)),
        (WINDOWED, None),
    ],
    ids=["draft", "lookup", "windows", "windows, lookup"],
)
def test_greedy_answers_are_those_of_plain_decoding(target, draft):
    generate, weights = opened(target)
    proposer, draft_weights = opened(draft, 1) if draft else (None, None)
    s = Sampling(tokens=24)
    plain = generate(weights, PROMPTS, s)
    fast = Speculative(generate, proposer, 3)
    assert fast(weights, draft_weights, PROMPTS, s).completions == plain
    # Each alone too: a row then advances by all that it may.
    for prompt, [expected] in zip(PROMPTS, plain, strict=True):
        found = fast(weights, draft_weights, [prompt], s)
        assert found.completions == [[expected]]
        assert found.rounds <= max(len(expected.tokens), 1)


def test_a_draft_that_is_the_model_needs_few_calls():
    generate, weights = opened(WINDOWED)
    endless = Generator(generate.model)
    fast = Speculative(endless, endless, 3)
    found = fast(weights, weights, PROMPTS, Sampling(tokens=25))
    assert found.rounds == 6  # one token from the prompt, then four a call
    assert found.completions == endless(weights, PROMPTS, Sampling(tokens=25))
    assert fast(weights, weights, PROMPTS, Sampling(tokens=25, temperature=1.0, top_k=9)).rounds == 6


@pytest.mark.parametrize("draft", ["model", "lookup"])
@pytest.mark.parametrize(
    "setting", [dict(temperature=0.8), pytest.param(dict(temperature=1.5, top_k=3), marks=pytest.mark.slow)], ids=str
)
def test_samples_follow_the_models_distribution(draft, setting):
    c = dataclasses.replace(TARGET, vocab=4, layers=1)
    layout = Layout.of(config.Mesh(), config.Execution(dtype="float32", scan=True))
    generate, weights = opened(c, 3, 0.4)
    generate = Generator(generate.model)
    proposer, draft_weights = opened(dataclasses.replace(DRAFT, vocab=4), 5, 0.4)
    prompt, n = [1, 2, 0, 1, 2], 1000

    @jax.jit
    def chances(tokens_BT):
        batch = dict(tokens=tokens_BT, positions=jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape))
        x = generate.model.forward(weights, batch).x_BTD
        z = losses.logits(generate.model.readout(weights, x), layout)[:, -1] / setting["temperature"]
        if "top_k" in setting:
            z = jnp.where(z < jax.lax.top_k(z, setting["top_k"])[0][:, -1:], -jnp.inf, z)
        return jax.nn.softmax(z, -1)

    first = np.asarray(chances(np.array([prompt])))[0]
    second = np.asarray(chances(np.array([[*prompt, a] for a in range(4)])))
    third = np.asarray(chances(np.array([[*prompt, a, b] for a in range(4) for b in range(4)]))).reshape(4, 4, 4)
    expected = first[:, None, None] * second[:, :, None] * third

    fast = Speculative(generate, Generator(proposer.model) if draft == "model" else None, 2)
    counts, rounds = np.zeros((4, 4, 4)), 0
    for seed in range(n):
        s = Sampling(tokens=3, seed=seed, **setting)
        found = fast(weights, draft_weights if draft == "model" else None, [prompt, prompt], s)
        rounds += found.rounds
        for [answer] in found.completions:
            counts[tuple(answer.tokens)] += 1
    assert rounds < 2 * n, "no proposal was ever accepted"
    often = 2 * n * expected >= 5  # the rest is counted together
    e = np.append(2 * n * expected[often], max(2 * n * expected[~often].sum(), 1e-9))
    o = np.append(counts[often], counts[~often].sum())
    chi2 = ((o - e) ** 2 / np.maximum(e, 1)).sum()
    assert often.sum() > 10 and chi2 < len(e) + 4 * np.sqrt(2 * len(e))
    assert (counts[expected == 0] == 0).all()


def test_what_does_not_go_with_it_is_refused():
    generate, weights = opened(TARGET)
    with pytest.raises(ValueError, match="vocabulary has 33 tokens and the model's 32"):
        Speculative(generate, opened(dataclasses.replace(DRAFT, vocab=33))[0])
    with pytest.raises(ValueError, match="0 proposals"):
        Speculative(generate, None, 0)
    with pytest.raises(ValueError, match="does not go with beams"):
        Speculative(generate)(weights, None, PROMPTS, Sampling(beams=2))
    c = gpt2.Config(vocab=32, layers=1, width=8, heads=1, positions=16)
    short = Generator(Model(gpt2, c, gpt2.specs(c), generate.model.shard))
    with pytest.raises(ValueError, match="the model has 16"):
        Speculative(short)(None, None, [[1] * 10], Sampling(tokens=7))
