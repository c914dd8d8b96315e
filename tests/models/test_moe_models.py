"""Models with experts: one update however it is cut up, experts kept even, files that can't be held refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec, tree
from jaxlm.core.spec import is_spec
from jaxlm.models import deepseek, gpt_oss, mixtral
from jaxlm.models.model import Model
from jaxlm.nn import attention, moe
from jaxlm.nn.layout import Layout, batch_sharding
from jaxlm.nn.mask import Mask
from jaxlm.nn.moe import Moe
from jaxlm.objectives import causal
from jaxlm.runtime.mesh import make_mesh, on_mesh, replicated
from jaxlm.training import optimizers, step

T = 16
SMALL = mixtral.Config(
    vocab=32, layers=1, width=16, heads=4, kv_heads=2, head_width=4, positions=T,
    moe=Moe(experts=4, top_k=2, ffn=12, balance=0.5, router_z=0.1, selection_bias=True, score="sigmoid"),
)  # fmt: skip
FREE = dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, balance=0.0, router_z=0.0))
TIGHT = dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, capacity=0.75))


def make_weights(specs) -> dict:
    """Of the initial ones' size; norms and biases as they begin."""
    rng = np.random.default_rng(0)

    def one(s: spec.Spec) -> np.ndarray:
        size = 0.0 if s.role in spec.VECTORS else 0.25
        return (rng.normal(0, size, s.shape) + (s.role == "norm")).astype(np.float32)

    return jax.tree.map(one, specs, is_leaf=is_spec)


@functools.cache
def make_step(c, optim_config: config.Optim, mesh_config: config.Mesh | None = None):
    mc = mesh_config or config.Mesh()
    mesh = make_mesh(mc, jax.devices()[:1] if mesh_config is None else jax.devices())
    layout = Layout.of(mc, config.Execution(dtype="float32"))
    specs = mixtral.specs(c)
    model = Model(mixtral, c, specs, layout)
    optimizer = optimizers.make(optim_config, 1000, specs)
    homes = step.shardings(specs, layout.shardings(specs, mesh), optimizer, False, replicated(mesh))
    one = step.make_train_step(
        lambda p, b, k: causal.loss(causal.Config(), model, p, b, None), causal.totals, optimizer,
        seed=0, clip=1.0, ema=0.0,
    )  # fmt: skip
    with on_mesh(mesh):
        params, frozen = tree.partition(make_weights(specs), optimizer.trainable)
        state = jax.device_put(step.start(params, frozen, optimizer, False), homes)
    return mesh, layout, state, jax.jit(one, out_shardings=(homes, None))


def rows(micro: int) -> dict:
    """Eight rows of unlike lengths."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 32, (8, T + 1)).astype(np.int32)
    segments = (np.arange(T)[None] < rng.integers(4, T + 1, (8, 1))).astype(np.int32)
    batch = dict(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], segments=segments, weights=segments.astype(np.float32),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (8, T)),
    )  # fmt: skip
    return {k: v.reshape(micro, 8 // micro, T) for k, v in batch.items()}


SGD = config.Optim(name="sgd", momentum=0.0, lr=0.3, warmup=0, weight_decay=0.0)


@functools.cache
def one_update(micro: int, mesh_config: config.Mesh | None = None):
    mesh, layout, state, run = make_step(TIGHT, SGD, mesh_config)
    with on_mesh(mesh):
        batch = {k: jax.device_put(v, batch_sharding(layout, mesh, v.shape, T)) for k, v in rows(micro).items()}
        state, metrics = run(state, batch)
    return {k: float(metrics[k]) for k in ("loss", "aux", "dropped", "nll", "grad_norm")}, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("micro", "mesh_config"),
    [
        pytest.param(2, None, marks=pytest.mark.slow),
        pytest.param(4, None, marks=pytest.mark.slow),
        (2, config.Mesh(data=2, expert=2, tensor=2, axis_type="explicit")),
    ],
    ids=["2 micro-batches", "4 micro-batches", "2 on a mesh"],
)
def test_the_same_update_however_the_batch_is_cut(micro, mesh_config):
    """Rows of unlike lengths, balance and z-loss included, and the share of choices that found no place."""
    expected, whole = one_update(1)
    got, parts = one_update(micro, mesh_config)
    assert expected["aux"] > 0.5 and 0.2 < expected["dropped"] < 0.6
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts, whole)


def test_a_selection_bias_moves_against_the_load_and_evens_it_out():
    """Without a balance loss, from biases that send most tokens to two of four experts."""
    c = FREE
    _, layout, state, run = make_step(c, dataclasses.replace(SGD, lr=1e-9, freeze=("router",)))
    state = state.replace(params=jax.tree.map(lambda x: x, state.params))  # whose dicts change below
    model, batch = Model(mixtral, c, mixtral.specs(c), layout), rows(1)
    skew = np.array([[0.2, 0.15, 0.0, 0.0]], np.float32)
    blocks = state.params["blocks"]
    blocks["selection_bias"] = jax.device_put(skew, blocks["selection_bias"].sharding)

    @jax.jit
    def load(weights: dict) -> jax.Array:
        """Of each expert, in equal shares, less one: what the biases' gradient says."""
        one = jax.tree.map(lambda a: a[0], batch)
        share = one["weights"].sum(-1) / one["weights"].sum()
        aux = lambda w: (model.forward(w, one).aux_B * share).sum()  # noqa: E731
        return jax.grad(aux)(weights)["blocks"]["selection_bias"][0] / moe.BIAS_PULL

    before = load(state.all_params)
    assert before.max() > 0.3
    for i in range(200):
        state, metrics = run(state, batch)
        if i == 0:
            moved = state.params["blocks"]["selection_bias"] - skew
            np.testing.assert_allclose(moved, -optimizers.BALANCE_RATE * jnp.sign(before)[None], rtol=1e-3)
        assert metrics["aux"] == 0
    assert jnp.abs(load(state.all_params)).max() < 0.1


def test_the_gradient_of_selection_biases_is_nothing_in_the_global_norm():
    """Else a load would be read as a steep loss, and clipping would slow everything down."""
    norms = []
    for frozen in ((), ("selection_bias",)):
        _, _, state, run = make_step(FREE, dataclasses.replace(SGD, lr=1e-9, freeze=("router", *frozen)))
        norms.append(float(run(state, rows(1))[1]["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_optimizers_take_experts_one_by_one_and_spare_their_biases():
    specs = gpt_oss.specs(gpt_oss.Config(vocab=32, layers=2, width=16, heads=4, kv_heads=2, head_width=4))
    groups = optimizers.make(config.Optim(name="muon"), 1000, specs).groups
    assert groups["blocks/experts/gate"] == "muon, decay 0.1"
    assert groups["blocks/experts/gate_bias"] == groups["blocks/q_bias"] == "adamw, no decay"
    stacked = specs["blocks"]["experts"]
    assert (
        optimizers.matrix_dimensions(stacked["gate"]) == optimizers.matrix_dimensions(stacked["down"]) == ((2,), (3,))
    )
    groups = optimizers.make(config.Optim(name="lion"), 1000, mixtral.specs(SMALL)).groups
    assert groups["blocks/selection_bias"] == "balance, no decay"


QWEN = dict(
    model_type="qwen3_moe", vocab_size=32, num_hidden_layers=4, hidden_size=16, num_attention_heads=4, num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=24,
)  # fmt: skip
DEEPSEEK = dict(
    model_type="deepseek_v2", vocab_size=32, num_hidden_layers=2, hidden_size=16, num_attention_heads=4,
    n_routed_experts=4, num_experts_per_tok=2, intermediate_size=24,
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (mixtral, QWEN | dict(mlp_only_layers=[2]), r"mlp_only_layers \[2\] puts dense layers after"),
        (mixtral, QWEN | dict(decoder_sparse_step=2), r"decoder_sparse_step 2 puts dense layers after"),
        (mixtral, QWEN | dict(hidden_act="gelu"), r"hidden_act 'gelu' of qwen3_moe"),
        (deepseek, DEEPSEEK | dict(norm_topk_prob=True), r"norm_topk_prob True of deepseek_v2"),
        (deepseek, DEEPSEEK | dict(topk_method="noaux_tc"), r"topk_method 'noaux_tc' of deepseek_v2"),
        (deepseek, DEEPSEEK | dict(num_key_value_heads=2), r"num_key_value_heads 2 of deepseek_v2"),
        (deepseek, DEEPSEEK | dict(mlp_bias=True), r"mlp_bias True of deepseek_v2"),
        (deepseek, DEEPSEEK | dict(moe_layer_freq=2), r"moe_layer_freq 2 of deepseek_v2"),
    ],
)
def test_a_published_model_that_would_differ_is_refused(family, values, message):
    with pytest.raises(ValueError, match=message):
        family.from_hf(values)


@pytest.mark.parametrize(
    ("family", "c", "message"),
    [
        (mixtral, SMALL, r"model\.moe\.score: sigmoid is not in files of model_type 'mixtral', which have softmax"),
        (mixtral, mixtral.Config(dense=1), r"model\.dense: not in files of model_type 'mixtral'"),
        (mixtral, mixtral.Config(model_type="qwen3_moe"), r"model\.qk_norm: files of model_type 'qwen3_moe'"),
        (mixtral, mixtral.Config(moe=Moe(shared=8)), r"model\.moe\.shared: 8 is not in files"),
        (gpt_oss, gpt_oss.Config(moe=Moe(normalized=False)), r"model\.moe\.normalized: False is not in files"),
        (deepseek, deepseek.Config(moe=Moe(score="sigmoid", shared=64)), r"model\.moe\.shared: 64 is not"),
        (deepseek, deepseek.Config(model_type="deepseek_v2"), r"model\.moe\.score: sigmoid is not in files"),
    ],
)
def test_a_model_that_its_files_can_not_say_is_not_written(family, c, message):
    with pytest.raises(ValueError, match=message):
        family.to_hf(c)


@pytest.mark.parametrize(
    ("c", "message"),
    [
        (Moe(experts=4, top_k=5), r"model\.moe\.top_k: 5 choices among 4 experts"),
        (Moe(experts=4, groups=3), r"model\.moe\.groups: 1 of 3 groups of 4 experts do not hold 2 choices"),
        (Moe(experts=4, groups=4, top_groups=1), r"model\.moe\.groups: 1 of 4 groups of 4 experts do not hold 2"),
    ],
)
def test_a_mixture_that_can_not_be_is_refused(c, message):
    with pytest.raises(ValueError, match=message):
        moe.specs(c, 16)


def test_an_absorbed_latent_cache_is_small():
    """A token keeps a latent and one rotated key, whatever the heads are."""
    c = deepseek.Config(layers=2, heads=64, latent=8, rotated_width=4)
    cache = deepseek.init_cache(c, 3, 10, jnp.bfloat16)
    assert [x.shape for x in jax.tree.leaves(cache.layers)] == [(3, 10, 8), (3, 10, 4)] * 2


LATENT = deepseek.Config(
    vocab=32, layers=1, dense=0, width=16, heads=4, plain_width=4, rotated_width=4, value_width=6, latent=8,
    moe=Moe(experts=4, top_k=2, ffn=8, capacity=0.5),
)  # fmt: skip


def test_read_on_from_latents_on_a_mesh():
    """Queries are taken to the latents, of which there is one a token for all heads; and experts then drop nothing."""
    specs = deepseek.specs(LATENT)
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) / 3, specs, is_leaf=is_spec)
    tokens, positions = (
        rng.integers(0, 32, (2, 6)).astype(np.int32),
        np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6)),
    )

    def read(mesh_config: config.Mesh, cuts: tuple[int, ...]) -> np.ndarray:
        mesh = make_mesh(mesh_config, jax.devices()[: 8 if cuts else 1])
        layout = Layout.of(mesh_config, config.Execution(dtype="float32"))
        layout = dataclasses.replace(layout, compute={**layout.compute, "batch": (), "seq": ()})
        free = dataclasses.replace(LATENT, moe=dataclasses.replace(LATENT.moe, capacity=None))
        c = LATENT if cuts else free
        run = jax.jit(lambda w, b, cache: deepseek.forward(c, specs, w, b, shard=layout, cache=cache))
        with on_mesh(mesh):
            w = jax.device_put(weights, layout.shardings(specs, mesh))
            cache, out = deepseek.init_cache(c, 2, 6, jnp.float32) if cuts else None, []
            for a, b in zip((0, *cuts), (*cuts, 6), strict=True):
                got = run(w, dict(tokens=tokens[:, a:b], positions=positions[:, a:b]), cache)
                cache = got.cache
                out.append(got.x_BTD)
            return np.concatenate(jax.device_get(out), 1)

    mesh = config.Mesh(data=2, expert=2, tensor=2, axis_type="explicit")
    np.testing.assert_allclose(read(mesh, (2, 4)), read(config.Mesh(), ()), atol=2e-5)


def test_a_fused_kernel_is_not_chosen_for_keys_and_values_of_unlike_widths(monkeypatch):
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    plain = dict(mask=Mask(True), bias=False, softcap=None, dtype="bfloat16")
    assert attention.choose("auto", **plain, widths=(64, 64)).implementation == "cudnn"
    assert attention.choose("auto", **plain, widths=(24, 16)) == attention.AttentionChoice(
        "xla", "cudnn has one width for keys and values, not 24 and 16"
    )
    with pytest.raises(ValueError, match=r"execution\.attention: cudnn has one width"):
        attention.choose("cudnn", **plain, widths=(24, 16))


DEEPSEEK_YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096)
PUBLISHED = {
    "mixtral-8x7b": (46_702_792_704, mixtral, dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6,
        sliding_window=None, max_position_embeddings=32768, rms_norm_eps=1e-5)),
    "qwen3-30b-a3b": (30_532_122_624, mixtral, dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True, rope_theta=1e6, rope_scaling=None, sliding_window=None,
        use_sliding_window=False, max_window_layers=48, decoder_sparse_step=1, mlp_only_layers=[])),
    "gpt-oss-20b": (20_914_757_184, gpt_oss, dict(
        model_type="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32, experts_per_token=4,
        rope_theta=150000, sliding_window=128, swiglu_limit=7.0, attention_bias=True, rope_scaling=dict(
            rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
            original_max_position_embeddings=4096))),
    "deepseek-v2-lite": (15_706_484_224, deepseek, dict(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        moe_intermediate_size=1408, first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax", n_group=1,
        topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0, moe_layer_freq=1,
        rope_scaling=DEEPSEEK_YARN | dict(mscale=0.707, mscale_all_dim=0.707))),
    "deepseek-v3": (671_026_419_200, deepseek, dict(
        model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
        moe_intermediate_size=2048, first_k_dense_replace=3, topk_method="noaux_tc", scoring_func="sigmoid", n_group=8,
        topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5, moe_layer_freq=1, num_nextn_predict_layers=1,
        rope_scaling=DEEPSEEK_YARN | dict(mscale=1.0, mscale_all_dim=1.0))),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """The settings that models are published with, as they stand in their config.json, and their known sizes."""
    count, family, values = PUBLISHED[name]
    c = family.from_hf(values)
    assert spec.count(family.specs(c)) == count
    assert family.from_hf(family.to_hf(c)) == dataclasses.replace(c, positions=c.positions or 1 << 20)
