"""Encoder-decoders: what the decoder sees of which source, step by step or at once, and files of every age."""

import dataclasses
import functools
import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from jaxlm.core import config, spec
from jaxlm.formats import huggingface
from jaxlm.models import MODELS, bart, t5
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.nn.layout import Layout
from jaxlm.runtime.mesh import make_mesh, on_mesh

V, T, S = 32, 8, 12
SMALL = {
    "t5": t5.Config(vocab=V, layers=1, width=16, heads=4, head_width=6, ffn=24, buckets=8, longest=10),
    "bart": bart.Config(vocab=V, layers=1, width=16, heads=4, ffn=24, positions=16, dropout=0.0),
}
SMALL["t5_first"] = dataclasses.replace(SMALL["t5"], gated=False, activation="relu", tied=True, scaled=True)
SMALL["bart_norm_first"] = dataclasses.replace(SMALL["bart"], norm_first=True, scaled=True)


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def make_model(name: str, layout: Layout | None = None, c=None) -> Model:
    family, c = MODELS[name.partition("_")[0]], c or SMALL[name]
    layout = layout or Layout(execution=config.Execution(dtype="float32"))
    return Model(family, c, family.specs(c), layout)


def make_weights(model: Model) -> dict:
    """Of the initial ones' size, but no bias is zero and no scale one."""
    rng = np.random.default_rng(0)

    def one(s: spec.Spec) -> np.ndarray:
        size = {"norm": 0.2, "table": 0.5}.get(s.role, 0.3)
        return (rng.normal(0, size, s.shape) + (s.role == "norm")).astype(np.float32)

    return jax.tree.map(one, model.specs, is_leaf=spec.is_spec)


def make_batch(segments=None, source_segments=None, rows: int = 2, length: int = T, source_length: int = S) -> dict:
    rng = np.random.default_rng(0)
    count = lambda n: np.broadcast_to(np.arange(n, dtype=np.int32), (rows, n))  # noqa: E731
    out = dict(tokens=rng.integers(0, V, (rows, length)), positions=count(length))
    out |= dict(source=rng.integers(0, V, (rows, source_length)), source_positions=count(source_length))
    given = dict(segments=segments, source_segments=source_segments)
    out |= {name: np.array(x) for name, x in given.items() if x is not None}
    return {name: x.astype(np.int32) for name, x in out.items()}


def all_logits(model: Model, weights: dict, batch: dict) -> jax.Array:
    return losses.logits(model.readout(weights, model.forward(weights, batch).x_BTD), model.shard)


# Where norms stand changes no mask: "bart_norm_first" is looked at among the slow tests.
@pytest.mark.parametrize("name", ["t5", "bart", pytest.param("bart_norm_first", marks=pytest.mark.slow)])
def test_a_target_sees_its_own_source_whole_and_no_other(name):
    """By gradient: two pairs in a row, and padding behind the targets alone."""
    segments, source_segments = np.array([1, 1, 1, 2, 2, 2, 0, 0]), np.array([1] * 4 + [2] * 8)
    model = make_model(name)
    weights, batch = make_weights(model), make_batch([segments], [source_segments], rows=1)
    batch |= dict(source=np.arange(S, dtype=np.int32)[None], tokens=np.arange(S, S + T, dtype=np.int32)[None])
    run = lambda x_VD: model.forward(weights | {"embed": x_VD}, batch).x_BTD[0]  # noqa: E731
    jacobian = np.asarray(jax.jit(jax.jacrev(run))(jnp.asarray(weights["embed"][: S + T])))
    strength = np.abs(jacobian).max((1, 3))  # [T, S + T]
    own_source = segments[:, None] == source_segments[None]
    own_past = (segments[:, None] == segments[None]) & np.tril(np.ones((T, T), bool))
    expected, real = np.concatenate([own_source, own_past], 1), segments > 0
    assert (strength[real][expected[real]] > 1e-6).all(), "a target is blind to what it should see"
    assert (strength[real][~expected[real]] == 0).all(), "a target sees what it must not"
    assert np.isfinite(jacobian).all()


@pytest.mark.slow  # as in `test_every_family.py`, with one layer
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_step_by_step_with_a_cache_equals_at_once(name):
    """Sources of 12 and 5 tokens, prompts of 1 and 3; the source comes with the first call alone."""
    model = make_model(name)
    weights = make_weights(model)
    start = np.array([[2], [0]])
    batch = make_batch(np.arange(T)[None] >= start, np.arange(S)[None] < [[S], [5]])
    batch["positions"] = np.maximum(batch["positions"] - start, 0).astype(np.int32)
    expected = jax.jit(functools.partial(all_logits, model))(weights, batch)

    @jax.jit
    def read(batch, cache):
        out = model.forward(weights, batch, cache=cache)
        return losses.logits(model.readout(weights, out.x_BTD), model.shard), out.cache

    first = {k: v if k.startswith("source") else v[:, :3] for k, v in batch.items()}
    z, cache = read(first, model.family.init_cache(model.config, 2, T, jnp.float32))
    got = [z]
    for t in range(3, T):
        z, cache = read({k: batch[k][:, t : t + 1] for k in ("tokens", "positions")}, cache)
        got.append(z)
    real = batch["segments"] > 0
    np.testing.assert_allclose(np.concatenate(got, 1)[real], np.asarray(expected)[real], atol=1e-5, rtol=1e-4)


def test_a_bias_of_distances_reaches_every_block_of_queries():
    """Rows of more than one block of queries: each pair alone equals the pairs packed."""
    model = make_model("t5", c=dataclasses.replace(SMALL["t5"], buckets=32, longest=128))
    weights, parts = make_weights(model), [make_batch(length=90, source_length=n, rows=1) for n in (80, 70)]
    parts[1]["tokens"] = (parts[1]["tokens"] + 1) % V
    numbers = [dict(p, segments=np.full((1, 90), i), source_segments=np.full(p["source"].shape, i))
               for i, p in enumerate(parts, 1)]  # fmt: skip
    row = {k: np.concatenate([p[k] for p in numbers], 1).astype(np.int32) for k in numbers[0]}
    run = jax.jit(functools.partial(all_logits, model))
    short = {k: np.pad(v, ((0, 0), (0, 10 * k.startswith("source")))) for k, v in numbers[1].items()}
    alone = [run(weights, {k: v.astype(np.int32) for k, v in p.items()}) for p in (numbers[0], short)]
    np.testing.assert_allclose(run(weights, row), np.concatenate(alone, 1), atol=1e-5, rtol=1e-4)


def test_padding_of_a_source_may_go_on_behind_the_last_position():
    model = make_model("bart")
    weights = make_weights(model)
    short = make_batch(np.ones((2, T)), np.ones((2, S)))
    long = {k: np.pad(v, ((0, 0), (0, 20))) if k.startswith("source") else v for k, v in short.items()}
    long["source_positions"] = make_batch(source_length=S + 20)["source_positions"]
    run = jax.jit(functools.partial(all_logits, model))
    np.testing.assert_allclose(run(weights, long), run(weights, short), atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_few_pairs_are_learned_by_heart(name):
    """Targets are their sources turned round, so only attention to the source tells one row from another."""
    model = make_model(name)
    rng = np.random.default_rng(3)
    source = np.stack([rng.permutation(V - 2)[:6] + 2 for _ in range(4)]).astype(np.int32)
    target = source[:, ::-1].copy()
    batch = make_batch(rows=4, length=6, source_length=6) | dict(source=source)
    batch["tokens"] = np.concatenate([np.zeros((4, 1), np.int32), target[:, :-1]], 1)
    tx = optax.adam(1e-2)

    @jax.jit
    def train(start):
        start, tree_of = jax.flatten_util.ravel_pytree(start)  # one array is one update

        def logits(w):
            return all_logits(model, tree_of(w), batch)

        def loss(w):
            r = model.readout(tree_of(w), model.forward(tree_of(w), batch).x_BTD)
            return losses.cross_entropy(r, target, jnp.ones(target.shape, jnp.float32), shard=model.shard).loss / 24

        def update(_, state):
            w, moments, _ = state
            value, gradients = jax.value_and_grad(loss)(w)
            with jax.numpy_dtype_promotion("standard"):  # of the optimizer, which isn't ours
                updates, moments = tx.update(gradients, moments, w)
            return optax.apply_updates(w, updates), moments, value

        weights, _, last = jax.lax.fori_loop(0, 150, update, (start, tx.init(start), jnp.zeros(())))
        return logits(weights), last

    z, loss = train(make_weights(model))
    assert loss < 0.1
    assert (np.argmax(z, -1) == target).all()


CASES = [("t5", "explicit"), *[pytest.param(n, k, marks=pytest.mark.slow) for n, k in (
    ("t5", "auto"), ("bart", "explicit"), ("bart", "auto"))]]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_sequences_cut_over_devices_equal_one_device(name, kind):
    """Packed rows whose sources are longer than their targets, over data, tensor and context."""
    batch = make_batch([[1, 1, 1, 2, 2, 2, 2, 0]] * 4, [[1] * 5 + [2] * 6 + [0]] * 4, rows=4)

    def run(c: config.Mesh, devices):
        mesh = make_mesh(c, devices)
        model = make_model(name, Layout.of(c, config.Execution(dtype="float32", scan=True)))
        homes = model.shard.shardings(model.specs, mesh)

        def loss(w, batch):
            r = model.readout(w, model.forward(w, batch).x_BTD)
            weights = (batch["segments"] > 0).astype(jnp.float32)
            return losses.cross_entropy(r, batch["tokens"], weights, shard=model.shard).loss / 28

        with on_mesh(mesh):
            weights = jax.device_put(make_weights(model), homes)
            out = jax.jit(jax.value_and_grad(loss), out_shardings=(None, homes))(weights, batch)
        return jax.device_get(out)

    got = run(config.Mesh(fsdp=2, tensor=2, context=2, axis_type=kind), jax.devices())
    expected = run(config.Mesh(), jax.devices()[:1])
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-3), got[1], expected[1])


@pytest.mark.parametrize("name", ["t5", "bart_norm_first"])
def test_dropout_follows_its_key_and_bfloat16_stays_bfloat16(name):
    model = make_model(name, c=dataclasses.replace(SMALL[name], dropout=0.2))
    weights, batch = make_weights(model), make_batch()
    run = jax.jit(lambda key: model.forward(weights, batch, key=key).x_BTD)
    a, again, b = (np.asarray(run(jax.random.key(k))) for k in (1, 1, 2))
    assert (a == again).all() and (a != b).any()
    half = make_model(name, Layout(execution=config.Execution(dtype="bfloat16")))
    assert jax.eval_shape(half.forward, weights, batch).x_BTD.dtype == jnp.bfloat16


# What the published directories say, shortened to what shapes the model.
T5_SMALL = dict(model_type="t5", d_ff=2048, d_kv=64, d_model=512, num_layers=6, num_heads=8, vocab_size=32128,
                dropout_rate=0.1, layer_norm_epsilon=1e-6, n_positions=512, relative_attention_num_buckets=32,
                decoder_start_token_id=0)  # fmt: skip
FLAN_BASE = T5_SMALL | dict(d_model=768, num_layers=12, num_decoder_layers=12, num_heads=12,
                            feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip
MT5_SMALL = FLAN_BASE | dict(model_type="mt5", d_ff=1024, d_model=512, num_layers=8, num_decoder_layers=8, num_heads=6,
                             vocab_size=250112)  # fmt: skip
BART_LARGE = dict(model_type="bart", vocab_size=50265, d_model=1024, encoder_layers=12, decoder_layers=12,
                  encoder_attention_heads=16, decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096,
                  max_position_embeddings=1024, activation_function="gelu", normalize_before=False,
                  normalize_embedding=True, static_position_embeddings=False, add_final_layer_norm=False,
                  scale_embedding=False, decoder_start_token_id=2)  # fmt: skip
MBART = BART_LARGE | dict(model_type="mbart", vocab_size=250027, normalize_before=True, add_final_layer_norm=True,
                          scale_embedding=True)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "count"),
    [
        (T5_SMALL, 60_506_624),
        (FLAN_BASE, 247_577_856),
        (MT5_SMALL, 300_176_768),
        (BART_LARGE, 406_291_456),
        (MBART, 610_851_840),
    ],
)
def test_parameters_as_published(values, count):
    family = next(f for f in MODELS.values() if values["model_type"] in f.MODEL_TYPES)
    c = family.from_hf(values)
    assert spec.count(family.specs(c)) - getattr(c, "head_bias", False) * c.vocab == count
    assert family.from_hf(family.to_hf(c)) == c
    assert (c.tied, c.scaled) == {"t5": (c.width == 512,) * 2, "mt5": (False, False), "bart": (True, False),
                                  "mbart": (True, True)}[c.model_type]  # fmt: skip


def test_a_head_is_there_if_its_tensor_is():
    """transformers 5 calls every T5 tied, whatever lies beside its config.json."""
    today = FLAN_BASE | dict(tie_word_embeddings=True, scale_decoder_outputs=False)
    for values in (FLAN_BASE, today, MT5_SMALL, MT5_SMALL | dict(tie_word_embeddings=True)):
        c = t5.from_hf(values)
        assert (c.tied, c.scaled) == (False, False)
        assert t5.infer_from_files(c, {"lm_head.weight"}) == c
        alone = t5.infer_from_files(c, {"shared.weight"})
        assert (alone.tied, alone.scaled) == (True, False)
        assert t5.infer_from_files(t5.from_hf(t5.to_hf(alone)), {"shared.weight"}) == alone
    assert "head_bias" in bart.specs(bart.infer_from_files(bart.from_hf(BART_LARGE), {"final_logits_bias"}))
    assert "head_bias" not in bart.specs(bart.infer_from_files(bart.from_hf(BART_LARGE), {"model.shared.weight"}))


def test_old_files_that_hold_an_embedding_several_times_are_read(tmp_path):
    """And a bias by distance in attention to the source, which was never used. Copies that differ are refused."""
    model = make_model("t5_first")
    weights = jax.tree.map(jnp.asarray, make_weights(model))
    huggingface.save(tmp_path, t5, model.config, model.specs, weights, dtype="float32", card=False)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    shared = tensors["shared.weight"]
    copies = dict.fromkeys(["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], shared)
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 4), np.float32)}
    one = jax.tree.map(lambda s: jax.sharding.SingleDeviceSharding(jax.devices()[0]), model.specs, is_leaf=spec.is_spec)
    safetensors.numpy.save_file(tensors | copies | unused, tmp_path / "model.safetensors")
    family, c = huggingface.describe(tmp_path, MODELS)
    assert (family, c) == (t5, dataclasses.replace(model.config, decoder_layers=1))
    back = huggingface.load(tmp_path, t5, c, model.specs, one)
    jax.tree.map(np.testing.assert_array_equal, back, weights)
    safetensors.numpy.save_file(tensors | copies | {"lm_head.weight": shared + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from shared\.weight"):
        huggingface.load(tmp_path, t5, c, model.specs, one)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (T5_SMALL | dict(feed_forward_proj="gated-sine"), "feed_forward_proj 'gated-sine' is unknown"),
        (T5_SMALL | dict(feed_forward_proj="double-relu"), "feed_forward_proj 'double-relu' is unknown"),
        (BART_LARGE | dict(normalize_before=True), "normalize_before True of bart is not supported, only False"),
        (MBART | dict(normalize_before=False), "normalize_before False of mbart is not supported, only True"),
        (BART_LARGE | dict(static_position_embeddings=True), "static_position_embeddings True of bart"),
        (BART_LARGE | dict(activation_function="sine"), "activation_function 'sine' is unknown"),
    ],
)
def test_files_that_mean_something_else_are_refused(values, message):
    family = t5 if values["model_type"] == "t5" else bart
    with pytest.raises(ValueError, match=message):
        family.from_hf(values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("t5_first", {"model_type": "mt5"}, r"model\.scaled: mT5 does not scale its output"),
        ("t5", {"activation": "gelu"}, r"model\.activation: .* use gelu_new"),
        ("bart", {"norm_first": True}, r"model\.norm_first: .* set model\.model_type=mbart"),
        ("bart", {"model_type": "mbart"}, r"model\.norm_first: .* set model\.model_type=bart"),
    ],
)
def test_models_that_no_file_can_express_are_refused(name, change, message):
    c = dataclasses.replace(SMALL[name], **change)
    with pytest.raises(ValueError, match=message):
        make_model(name).family.to_hf(c)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("t5", {"buckets": 2}, r"model\.buckets: 2 must be at least 4"),
        ("t5", {"longest": 4}, r"model\.longest 4 above its half"),
        ("bart", {"heads": 3}, r"model\.width: 16 is not a multiple of model\.heads 3"),
        ("bart", {"decoder_heads": 3}, r"model\.width: 16 is not a multiple of model\.decoder_heads 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, c=dataclasses.replace(SMALL[name], **change))
