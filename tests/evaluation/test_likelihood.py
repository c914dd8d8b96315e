"""Likelihoods equal those of one whole forward pass, whatever the batch, the padding and the mesh."""

import jax
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.evaluation import likelihood
from jaxlm.evaluation.likelihood import Request, Scorer, split, windows
from jaxlm.models import llama, t5
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import make_mesh, on_mesh

V = 64


def make(family=llama, **more):
    shape = dict(vocab=V, layers=1, width=16, heads=2, head_width=8, ffn=24, positions=96)
    c = family.Config(**shape | (dict(kv_heads=1) if family is llama else {}) | more)
    specs = family.specs(c)
    layout = Layout.of(config.Mesh(), config.Execution(dtype="float32"))
    weights = jax.tree.map(lambda w: 2 * w, spec.init(specs, jax.random.key(0)))
    return Model(family, c, specs, layout), weights


def requests(lengths) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, V, a).tolist(), rng.integers(0, V, b).tolist()) for a, b in lengths]


def all_logits(model, weights, batch) -> jax.Array:
    @jax.jit
    def run(weights, batch):
        return losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)

    return run(weights, batch)


def alone(model, weights, r: Request) -> float:
    """From the logits of one row without any padding."""
    if model.family.kind == "encoder_decoder":
        tokens, m = [model.config.decoder_start, *r.continuation[:-1]], len(r.context)
        batch = dict(source=np.array([r.context]), source_positions=np.arange(m)[None],
                     source_segments=np.ones((1, m), int))  # fmt: skip
    else:
        tokens, batch = [*r.context, *r.continuation][:-1], {}
    batch |= dict(tokens=np.array([tokens]), positions=np.arange(len(tokens))[None])
    z_TV = np.asarray(all_logits(model, weights, batch))[0][-len(r.continuation) :]
    p_TV = z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True))
    return float(p_TV[np.arange(len(r.continuation)), list(r.continuation)].sum())


@pytest.mark.parametrize("family", [llama, t5])
def test_likelihoods_of_ragged_requests(family):
    model, weights = make(family)
    asked = requests([(3, 1), (40, 2), (5, 5), (2, 1)])
    found = Scorer(model, weights, rows=2)(asked)
    np.testing.assert_allclose([s.log_likelihood for s in found], [alone(model, weights, r) for r in asked], atol=2e-4)


def test_greedy_means_every_token(monkeypatch):
    model, weights = make()
    context, likeliest = [5, 9, 2], []
    for _ in range(3):
        batch = dict(tokens=np.array([context + likeliest]), positions=np.arange(3 + len(likeliest))[None])
        likeliest.append(int(all_logits(model, weights, batch)[0, -1].argmax()))
    other = [*likeliest[:2], (likeliest[2] + 1) % V]
    found = Scorer(model, weights)([Request(context, likeliest), Request(context, other)])
    assert [s.greedy for s in found] == [True, False]


def test_contexts_that_do_not_fit_lose_their_beginning():
    model, weights = make()
    [long] = requests([(50, 4)])
    scorer = Scorer(model, weights, longest=16)
    [found] = scorer([long])
    np.testing.assert_allclose(found.log_likelihood, alone(model, weights, long._replace(context=long.context[-13:])),
                               atol=2e-4)  # fmt: skip
    assert scorer.truncated == 1
    with pytest.raises(ValueError, match="a continuation has 17 tokens, the model 16 places"):
        scorer(requests([(1, 17)]))
    with pytest.raises(ValueError, match="without context or continuation"):
        scorer([Request([], [1])])


def test_windows_score_each_token_once():
    text = list(range(10, 33))
    parts = windows(text, 1, 8)
    assert [t for p in parts for t in p.continuation] == text
    assert parts[0] == Request([1], text[:8])
    assert parts[1] == Request(text[7:8], text[8:16])
    assert parts[2] == Request(text[14:16], text[16:23])  # filled up to eight places with what came before
    assert windows([], 1, 8) == []


def test_few_programs(monkeypatch):
    sizes = {likelihood.size(n, 32) for n in range(1, 2049)}
    assert len(sizes) < 16 and max(sizes) == 2048
    assert all(n <= likelihood.size(n, 32) < 2 * n for n in range(33, 2049))


def test_spaces_go_to_the_continuation_and_joins_hold():
    words = lambda text: [hash(w) % 1000 for w in text.replace(" ", " _").split(" ") if w]  # noqa: E731
    assert split(words, words, "a b ", "c") == split(words, words, "a b", " c") == Request(words("a b"), words(" c"))
    joined = lambda text: [len(text)]  # noqa: E731  # one token for any text
    assert split(joined, joined, "ab", "cd") == Request([2], [2])
    assert split(joined, joined, " ", "cd") == Request([0], [3]) or split(joined, joined, " ", "cd").continuation == [3]


def test_a_mesh_scores_the_same():
    model, weights = make()
    asked = requests([(3, 1), (40, 2), (5, 5)])
    expected = Scorer(model, weights)(asked)
    mesh = make_mesh(config.Mesh(data=8))
    with on_mesh(mesh):
        placed = jax.device_put(weights, model.shard.shardings(model.specs, mesh))
        found = Scorer(model, placed)(asked)
    np.testing.assert_allclose([s.log_likelihood for s in found], [s.log_likelihood for s in expected], atol=2e-4)
