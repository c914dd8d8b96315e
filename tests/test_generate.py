"""Text from a model: the same as asking the whole model again for every token, whatever shares the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, losses, params, sharding
from jaxlm.generate import BUCKET, make_generate, pick
from jaxlm.models import MODELS, Model, bert, gpt2, llama

CONFIGS = {
    "llama": llama.Config(vocab=32, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=32),
    "gpt2": gpt2.Config(vocab=32, layers=2, width=16, heads=2, positions=48),
}
PROMPTS = [[1, 2, 3, 4], [9], [30, 31]]


def make_model(name: str, **mesh) -> tuple[Model, dict]:
    c, layout = CONFIGS[name], sharding.Layout.of(config.Mesh(**mesh), config.Execution(dtype="float32", scan=True))
    specs = MODELS[name].specs(c)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) / 3, specs, is_leaf=params.is_spec)
    return Model(MODELS[name], c, specs, layout), weights


def by_hand(model: Model, weights, prompt: list[int], n: int) -> list[int]:
    """Greedy, one whole forward pass of the bare prompt for every token."""

    @jax.jit
    def forward(tokens_BT):
        batch = {"tokens": tokens_BT, "positions": jnp.arange(tokens_BT.shape[1])[None]}
        return losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)[0, -1].argmax()

    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(forward(np.array([tokens], np.int32))))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_greedy_equals_the_full_forward_for_ragged_prompts(name):
    model, weights = make_model(name)
    made = make_generate(model, eos=None, new_tokens=3)(weights, PROMPTS)
    assert made == [by_hand(model, weights, p, 3) for p in PROMPTS]


def test_each_row_stops_at_its_own_end():
    model, weights = make_model("llama")
    free = make_generate(model, eos=None, new_tokens=12)(weights, PROMPTS)
    eos = free[0][3]
    cut = [row[: row.index(eos)] if eos in row else row for row in free]
    assert make_generate(model, eos=eos, new_tokens=12)(weights, PROMPTS) == cut
    assert len(cut[0]) <= 3 and {len(row) for row in cut} != {len(cut[0])}, "the test needs rows of different lengths"


def test_one_program_for_every_length_of_a_bucket():
    model, weights = make_model("llama")
    generate = make_generate(model, eos=None, new_tokens=4)
    generate(weights, [[1, 2, 3]])
    counts = []
    original = model.family.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.family, "forward", lambda *a, **k: counts.append(1) or original(*a, **k))
        generate(weights, [[1] * (BUCKET - 4)])
        assert counts == []
        generate(weights, [[1] * BUCKET])
        assert counts != []


def test_the_seed_decides_what_is_sampled():
    model, weights = make_model("llama")
    generate = make_generate(model, eos=None, new_tokens=12, temperature=2.0)
    assert generate(weights, PROMPTS, 1) == generate(weights, PROMPTS, 1) != generate(weights, PROMPTS, 2)


@pytest.mark.parametrize("axis_type", ["auto", "explicit"])
def test_on_a_mesh_any_number_of_prompts(axis_type):
    """Prompts need not divide over the devices."""
    c = config.Mesh(fsdp=4, tensor=1, data=2, axis_type=axis_type)
    model, weights = make_model("llama", fsdp=4, data=2, axis_type=axis_type)
    mesh = sharding.make_mesh(c)
    with sharding.on_mesh(mesh):
        placed = jax.device_put(weights, model.shard.shardings(model.specs, mesh))
        made = make_generate(model, eos=None, new_tokens=4)(placed, PROMPTS)
    alone, weights = make_model("llama")
    assert made == make_generate(alone, eos=None, new_tokens=4)(weights, PROMPTS)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_prompts_that_do_not_fit_are_refused():
    model, weights = make_model("gpt2")
    generate = make_generate(model, eos=None, new_tokens=8)
    with pytest.raises(ValueError, match=r"prompt and new tokens take 49 positions and the model has 48; shorten"):
        generate(weights, [[1] * 41])
    assert len(generate(weights, [[1] * 40])[0]) == 8  # to the last position


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    model, weights = make_model("llama")
    with pytest.raises(ValueError, match="empty prompt"):
        make_generate(model, eos=None, new_tokens=2)(weights, prompts)


def test_encoders_are_refused():
    model = Model(bert, bert.Config(), {}, sharding.Layout())
    with pytest.raises(ValueError, match="encoder"):
        make_generate(model, eos=None, new_tokens=2)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_k": 33}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
    ],
)
def test_settings_out_of_range_are_refused(setting, name):
    with pytest.raises(ValueError, match=f"--{name} is out of range"):
        make_generate(make_model("llama")[0], eos=None, new_tokens=2, **setting)


# ------------------------------------------------------------------------------------------------------------- sampling

Z = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ((0.0, 0, 1.0), [1, 0, 0, 0]),
        ((1.0, 0, 1.0), [0.4, 0.3, 0.2, 0.1]),
        ((0.5, 0, 1.0), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ((1.0, 2, 1.0), [4 / 7, 3 / 7, 0, 0]),
        ((1.0, 1, 1.0), [1, 0, 0, 0]),
        ((1.0, 0, 0.5), [4 / 7, 3 / 7, 0, 0]),  # the token that crosses is kept
        ((1.0, 0, 0.05), [1, 0, 0, 0]),
        ((1.0, 3, 0.6), [4 / 7, 3 / 7, 0, 0]),  # top-p of what top-k left: 4/9 and 7/9
        ((1.0, 0, 0.95), [0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_sampling_follows_the_distribution(setting, expected):
    drawn = pick(jnp.broadcast_to(Z, (20_000, 4)), jax.random.key(0), *setting)
    shares = np.bincount(drawn, minlength=4) / 20_000
    assert drawn.dtype == jnp.int32
    np.testing.assert_allclose(shares, expected, atol=0.015)
    assert (shares[np.array(expected) == 0] == 0).all()


def test_rows_are_filtered_by_themselves():
    z = jnp.stack([Z, Z[::-1]])
    drawn = [pick(z, jax.random.key(i), 1.0, 1, 1.0).tolist() for i in range(3)]
    assert drawn == [[0, 3]] * 3
