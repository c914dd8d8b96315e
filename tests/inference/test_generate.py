"""Text from a model: the same as asking the whole model again for every token, whatever shares the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.inference.decode import BUCKET, extend, left_padded, prefill, prepare
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models import MODELS, bert, gpt2, llama, mixtral
from jaxlm.models.model import Model
from jaxlm.nn import losses, moe
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import make_mesh, on_mesh

CONFIGS = {
    "llama": llama.Config(vocab=32, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=32),
    "windowed": llama.Config(
        vocab=32, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=32, window=6, windowed=(True, False)
    ),
    "two heads": llama.Config(vocab=32, layers=2, width=16, heads=4, kv_heads=2, head_width=8, ffn=32),
    "gpt2": gpt2.Config(vocab=32, layers=2, width=16, heads=2, positions=48),
}
PROMPTS = [[1, 2, 3, 4], [9], [30, 31]]


def make_model(name: str, **mesh) -> tuple[Model, dict]:
    c, layout = CONFIGS[name], Layout.of(config.Mesh(**mesh), config.Execution(dtype="float32", scan=True))
    family = MODELS["gpt2" if name == "gpt2" else "llama"]
    specs = family.specs(c)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) / 3, specs, is_leaf=spec.is_spec)
    return Model(family, c, specs, layout), weights


def by_hand(model: Model, weights, prompt: list[int], n: int) -> list[int]:
    """Greedy, one whole forward pass without a cache for every token; what stands right of it can't be seen."""

    @jax.jit
    def forward(tokens_BT, at):
        batch = {"tokens": tokens_BT, "positions": jnp.arange(tokens_BT.shape[1])[None]}
        return losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)[0, at].argmax()

    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + n):
        tokens[0, at] = forward(tokens, at - 1)
    return tokens[0, len(prompt) : len(prompt) + n].tolist()


def tokens(found) -> list[list[int]]:
    return [answer.tokens for answers in found for answer in answers]


@pytest.mark.parametrize("name", ["llama", "windowed", "gpt2"])
def test_greedy_equals_the_full_forward_for_ragged_prompts(name):
    model, weights = make_model(name)
    made = tokens(Generator(model)(weights, PROMPTS, Sampling(tokens=12)))
    assert made == [by_hand(model, weights, p, 12) for p in PROMPTS]


@pytest.mark.parametrize("name", ["llama", "windowed", "gpt2"])
def test_reading_on_by_several_tokens_equals_reading_one_at_a_time(name):
    model, weights = make_model(name)
    batch = left_padded(PROMPTS)
    lengths = np.array([len(p) for p in PROMPTS])[:, None]
    ids = np.random.default_rng(1).integers(0, 32, (3, 3))
    slack = dict(slack=2) if name == "windowed" else {}

    @jax.jit
    def at_once(weights):
        _, cache = prefill(model, weights, batch, 2 * BUCKET, **slack)
        return extend(model, weights, cache, ids, lengths + np.arange(3))[0]

    @jax.jit
    def in_turn(weights):
        _, cache = prefill(model, weights, batch, 2 * BUCKET)
        out = []
        for i in range(3):
            z, cache = extend(model, weights, cache, ids[:, i : i + 1], lengths + i)
            out.append(z[:, 0])
        return jnp.stack(out, 1)

    np.testing.assert_allclose(at_once(weights), in_turn(prepare(model, weights)), atol=1e-4)


def test_prompts_go_to_the_experts_that_training_sends_them_to(monkeypatch):
    """In bfloat16 too, where a rounded router would send some elsewhere."""
    c = mixtral.Config(
        vocab=32, layers=2, width=16, heads=2, kv_heads=1, head_width=8, moe=moe.Moe(experts=64, top_k=8, ffn=4)
    )
    layout = Layout(execution=config.Execution(dtype="bfloat16", scan=False))
    model, rng = Model(mixtral, c, mixtral.specs(c), layout), np.random.default_rng(0)
    weights = jax.tree.map(
        lambda s: rng.standard_normal(s.shape).astype(np.float32) / 3, model.specs, is_leaf=spec.is_spec
    )
    seen, route = [], moe.route
    monkeypatch.setattr(moe, "route", lambda *args: seen.append(route(*args)[1]) or route(*args))
    batch = left_padded([rng.integers(0, 32, BUCKET).tolist()] * 4)

    def forward(weights):
        x_BTD = model.forward(weights, batch).x_BTD[:, -1:]
        return losses.logits(model.readout(weights, x_BTD), layout)[:, 0], tuple(seen)

    def generation(weights):
        seen.clear()
        return prefill(model, weights, batch, 2 * BUCKET)[0], tuple(seen)

    prepared = prepare(model, weights)
    assert prepared["blocks"][0]["experts"]["up"].dtype == jnp.bfloat16
    (expected, chosen), (got, too) = jax.jit(forward)(weights), jax.jit(generation)(prepared)
    np.testing.assert_array_equal(too, chosen)
    np.testing.assert_allclose(got, expected, atol=0.05)


def test_each_row_stops_at_its_own_end():
    model, weights = make_model("llama")
    free = tokens(Generator(model)(weights, PROMPTS, Sampling(tokens=12)))
    eos = free[0][3]
    cut = [row[: row.index(eos)] if eos in row else row for row in free]
    found = Generator(model, [eos])(weights, PROMPTS, Sampling(tokens=12))
    assert tokens(found) == cut
    assert len(cut[0]) <= 3 and {len(row) for row in cut} != {len(cut[0])}, "the test needs rows of different lengths"
    assert [a.reason for [a] in found] == ["stop" if len(row) < 12 else "length" for row in cut]


def test_one_program_for_every_length_of_a_bucket_and_every_temperature():
    model, weights = make_model("llama")
    generate = Generator(model)
    generate(weights, [[1, 2, 3]], Sampling(tokens=4, temperature=0.5, seed=1))
    counts = []
    original = model.family.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.family, "forward", lambda *a, **k: counts.append(1) or original(*a, **k))
        generate(weights, [[1] * BUCKET], Sampling(tokens=6, temperature=0.7, seed=2))
        assert counts == []
        generate(weights, [[1] * (BUCKET + 1)], Sampling(tokens=4, temperature=0.5))
        assert counts != []


def test_the_seed_decides_what_is_sampled():
    model, weights = make_model("llama")
    generate = Generator(model)

    def made(seed: int) -> list[list[int]]:
        return tokens(generate(weights, PROMPTS, Sampling(tokens=12, temperature=2.0, seed=seed)))

    assert made(1) == made(1) != made(2)


def test_several_samples_of_a_prompt_differ_and_start_from_the_same_cache():
    model, weights = make_model("windowed")
    found = Generator(model)(weights, PROMPTS, Sampling(tokens=12, temperature=2.0, samples=3))
    assert [len(answers) for answers in found] == [3, 3, 3]
    assert all(len({tuple(a.tokens) for a in answers}) == 3 for answers in found)
    # so cold that it is greedy
    cold = Generator(model)(weights, PROMPTS, Sampling(tokens=12, temperature=1e-4, samples=3))
    assert tokens(cold) == [by_hand(model, weights, p, 12) for p in PROMPTS for _ in range(3)]


@pytest.mark.parametrize(
    ("axis_type", "sizes"),
    [
        ("explicit", dict(fsdp=2, tensor=2, data=2)),
        *[
            pytest.param(kind, sizes, marks=pytest.mark.slow)
            for kind, sizes in [
                ("explicit", dict(fsdp=4, data=2)),
                ("auto", dict(fsdp=4, data=2)),
                ("auto", dict(fsdp=2, tensor=2, data=2)),
            ]
        ],
    ],
    ids=str,
)
def test_on_a_mesh_any_number_of_prompts(axis_type, sizes):
    """Prompts need not divide over the devices."""
    c = config.Mesh(**sizes, axis_type=axis_type)
    how = Sampling(tokens=4, repetition_penalty=1.3, logprobs=2)
    model, weights = make_model("two heads", **sizes, axis_type=axis_type)
    mesh = make_mesh(c)
    with on_mesh(mesh):
        placed = jax.device_put(weights, model.shard.shardings(model.specs, mesh))
        made = Generator(model)(placed, PROMPTS, how)
    alone, weights = make_model("two heads")
    expected = Generator(alone)(weights, PROMPTS, how)
    assert tokens(made) == tokens(expected)
    np.testing.assert_allclose(made[0][0].logprobs, expected[0][0].logprobs, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_prompts_that_do_not_fit_are_refused():
    model, weights = make_model("gpt2")
    generate = Generator(model)
    with pytest.raises(ValueError, match=r"prompt and new tokens take 49 positions and the model has 48; shorten"):
        generate(weights, [[1] * 41], Sampling(tokens=8))
    assert len(tokens(generate(weights, [[1] * 40], Sampling(tokens=8)))[0]) == 8  # to the last position


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    model, weights = make_model("llama")
    with pytest.raises(ValueError, match="empty prompt"):
        Generator(model)(weights, prompts, Sampling(tokens=2))


def test_encoders_are_refused():
    model = Model(bert, bert.Config(), {}, Layout())
    with pytest.raises(ValueError, match="encoder"):
        Generator(model)
