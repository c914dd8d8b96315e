"""Layers in stages: the same loss and the same updated weights as on one device, whatever else the mesh splits."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.models import MODELS
from jaxlm.nn import attention, block_stack, layers, pipeline
from jaxlm.nn.layout import Layout, batch_sharding
from jaxlm.nn.moe import Moe
from jaxlm.runtime.mesh import make_mesh, on_mesh

B, T, S, V = 8, 16, 8, 32
SMALL = dict(vocab=V, layers=4, width=16, heads=4, ffn=32)
GROUPED = SMALL | dict(kv_heads=2, head_width=8)
EXPERTS = {name: n for name, n in GROUPED.items() if name != "ffn"} | dict(moe=Moe(experts=4, ffn=16))
MODEL = {
    "llama": GROUPED,
    "gpt2": SMALL | dict(positions=T),
    "gemma": GROUPED | dict(window=5, softcap_scores=5.0, model_type="gemma2", score_width=8),
    "olmo": GROUPED,
    "bert": SMALL | dict(positions=T, dropout=0.0),
    "modernbert": SMALL | dict(layers=5, positions=T, window=5, windowed=(False, True)),
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS | dict(window=5),
    "deepseek": dict(
        vocab=V,
        layers=5,
        dense=1,
        width=16,
        heads=4,
        plain_width=4,
        rotated_width=4,
        value_width=4,
        latent=8,
        query_rank=None,
        ffn=32,
        moe=Moe(experts=4, ffn=16, shared=16),
    ),
    "t5": SMALL | dict(head_width=4, decoder_layers=2),
    "bart": SMALL | dict(positions=T, dropout=0.0),
}


def model(family: str, **more):
    return MODELS[family].Config(**MODEL[family] | more)


def make_weights(specs: dict) -> dict:
    """Near the initial ones, but no bias is zero and no scale one."""
    rng = np.random.default_rng(2)
    draw = lambda s: (rng.normal(0, 0.25, s.shape) + (s.role == "norm")).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, specs, is_leaf=spec.is_spec)


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {}
    for name, length in (("", T), ("source_", S)):
        out[f"{name}segments"] = np.sort(rng.integers(1, 3, (B, length)), -1).astype(np.int32)
        out[f"{name}positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    out["source"] = rng.integers(0, V, (B, S)).astype(np.int32)
    return out | dict(tokens=rng.integers(0, V, (B, T)).astype(np.int32))


@cache
def update(family: str, mesh: config.Mesh | None, *, dropout: int | None = None, remat: str = "none", **more) -> tuple:
    """(loss, weights after a step down its gradient, compiled program)."""
    c, module = model(family, **more), MODELS[family]
    specs, devices = module.specs(c), None if mesh is None else make_mesh(mesh)
    mesh = mesh or config.Mesh()
    layout = Layout.of(mesh, config.Execution(dtype="float32", scan=True, remat=remat))  # type: ignore[arg-type]
    target_BTD = np.random.default_rng(1).standard_normal((B, T, c.width)).astype(np.float32)

    def loss(weights: dict, batch: dict) -> jax.Array:
        key = None if dropout is None else jax.random.key(dropout)
        out = module.forward(c, specs, weights, batch, shard=layout, key=key)
        error = jnp.square(out.x_BTD - layout(jnp.asarray(target_BTD), "batch", "seq", None)).mean()
        return error if out.aux_B is None else error + out.aux_B.mean()

    def step(weights: dict, batch: dict) -> tuple:
        value, grads = jax.value_and_grad(loss)(weights, batch)
        return value, jax.tree.map(lambda w, g: w - 0.3 * g, weights, grads)

    homes = layout.shardings(specs, devices)
    with on_mesh(devices):
        weights = jax.device_put(make_weights(specs), homes)
        place = lambda x: batch_sharding(layout, devices, (1, *x.shape), x.shape[1])  # noqa: E731
        batch = {n: jax.device_put(x[None], place(x))[0] for n, x in make_batch().items()}
        run = jax.jit(step, out_shardings=(None, homes)).lower(weights, batch).compile()
        value, weights = run(weights, batch)
        return float(value), jax.device_get(weights), run


@cache
def expected(family: str, layers: int | None = None) -> tuple:
    return update(family, None, **({} if layers is None else dict(layers=layers)))[:2]


def same(got: tuple, want: tuple) -> None:
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got[1], want[1])


MESHES = {
    "stage x data": config.Mesh(stage=2, data=4),
    "stage x fsdp": config.Mesh(stage=4, fsdp=2, pipeline_micro=4, axis_type="explicit"),
    "stage x fsdp x tensor": config.Mesh(stage=2, fsdp=2, tensor=2),
    "stage x ring x data": config.Mesh(stage=2, context=2, data=2, context_by="ring"),
    "stage x heads x data": config.Mesh(stage=2, context=2, data=2, context_by="heads", axis_type="explicit"),
    "stage x expert x data": config.Mesh(stage=2, expert=2, data=2),
    "rounds x data": config.Mesh(stage=2, rounds=2, data=4),
    "rounds x fsdp x tensor": config.Mesh(stage=2, rounds=2, fsdp=2, tensor=2, axis_type="explicit", pipeline_micro=2),
}
# `training/test_meshes.py` holds the other kinds of families in stages to one device, in many meshes.
EXPLICIT = ["stage x fsdp", "rounds x fsdp x tensor"]
QUICK = [("bert", "stage x data")]
SLOW = [("llama", mesh) for mesh in MESHES] + [
    *[(family, "stage x fsdp x tensor") for family in MODEL],
    *[(family, "stage x ring x data") for family in MODEL],
    ("mixtral", "stage x expert x data"),
]


@pytest.mark.parametrize(
    ("family", "mesh"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in dict.fromkeys(SLOW) if case not in QUICK)],
)
def test_stages_equal_one_device(family: str, mesh: str) -> None:
    same(update(family, MESHES[mesh]), expected(family))


THREE_ROUNDS = config.Mesh(stage=2, rounds=3, data=4)


def in_three_rounds() -> tuple:
    return update("llama", THREE_ROUNDS, remat="full", layers=6)


def test_rounds_that_share_no_divisor_with_the_stages() -> None:
    """And every stage computes what it was handed again."""
    same(in_three_rounds(), expected("llama", 6))


@pytest.mark.parametrize("of", [lambda: update("bert", MESHES["stage x data"]), in_three_rounds], ids=["one", "three"])
def test_weights_rest_and_stay_with_their_stages(of) -> None:
    """Activations go from stage to stage (and in rounds the weights, each once); nothing is ever gathered."""
    program = of()[2]
    hlo = program.as_text()
    assert "collective-permute" in hlo and "all-gather" not in hlo and "all-to-all" not in hlo
    q = program.input_shardings[0][0]["blocks"]["q"]
    assert q.shard_shape((6, 16, 4, 8)) == (3, 16, 4, 8)


@pytest.mark.parametrize(("S", "R"), [(2, 2), (2, 3), (4, 2), (4, 6), (3, 3)])
def test_rounds_deal_chunks_by_as_few_permutations_as_there_are_rounds(S: int, R: int) -> None:
    dealt = {}
    for pairs, sent, received in pipeline.permutations(S, R):
        assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == list(range(S))
        dealt |= {(b, int(received[b])): a * R + int(sent[a]) for a, b in pairs}
    assert dealt == {(s, r): r * S + s for s in range(S) for r in range(R)}


def test_dropout_of_each_micro_batch_is_its_own_and_the_same_every_time() -> None:
    c, module = model("llama", dropout=0.5), MODELS["llama"]
    mesh = config.Mesh(stage=2, data=1, pipeline_micro=4)
    layout = Layout.of(mesh, config.Execution(dtype="float32", scan=True))
    batch = {n: np.broadcast_to(x[:1], x.shape) for n, x in make_batch().items()}  # eight times one row
    with on_mesh(make_mesh(mesh, jax.devices()[:2])):
        specs = module.specs(c)
        weights = make_weights(specs)

        def hidden(weights: dict, batch: dict) -> jax.Array:
            x_BTD = jnp.ones((B, T, c.width), jnp.float32)
            return pipelined(c, specs, weights, x_BTD, layout)

        x_BTD, again = (jax.jit(hidden)(weights, batch) for _ in range(2))
    np.testing.assert_array_equal(x_BTD, again)
    assert len({np.asarray(row).tobytes() for row in x_BTD[:4]}) == 4, "rows of different micro-batches"


def pipelined(c, specs: dict, weights: dict, x_BTD: jax.Array, layout: Layout) -> jax.Array:
    """Layers that do nothing but drop."""

    def block(p, x, rows, key, kind, kept):
        return layers.dropout(x, c.dropout, key), None

    return block_stack.run_blocks(
        block, weights["blocks"], specs["blocks"], x_BTD, shard=layout, key=jax.random.key(1)
    )[0]


def test_a_cache_is_read_layer_by_layer() -> None:
    """Generation needs no pipeline: every stage computes all."""
    c, module = model("llama"), MODELS["llama"]
    specs, batch = module.specs(c), {n: x for n, x in make_batch().items() if n in ("tokens", "positions")}
    mesh = config.Mesh(stage=2, data=4)
    layout = Layout.of(mesh, config.Execution(dtype="float32"))
    weights = make_weights(specs)
    want = jax.jit(lambda w, b: module.forward(c, specs, w, b, shard=layout).x_BTD)(weights, batch)
    devices = make_mesh(mesh)
    with on_mesh(devices):
        placed = jax.device_put(weights, layout.shardings(specs, devices))
        cache = module.init_cache(c, B, T, jnp.float32)
        got = jax.jit(lambda w, b, k: module.forward(c, specs, w, b, shard=layout, cache=k).x_BTD)(placed, batch, cache)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def note(train: config.Train, layers: int = 4, family: str = "llama", **mesh) -> str | None:
    c = config.Mesh(**mesh)
    layout = Layout.of(c, config.Execution())
    choice = pipeline.choose(layout, make_mesh(c), MODELS[family].specs(model(family, layers=layers)), train)
    return choice and choice.describe()


def test_the_description_of_a_pipeline() -> None:
    train = config.Train(batch_size=32)
    assert note(train, stage=2, data=4) == "GPipe over 2 stages, 4 micro-batches a pass, idle 20.0% of the time"
    assert note(train, stage=2, data=4, rounds=2, pipeline_micro=2) == (
        "interleaved, 2 rounds over 2 stages, 2 micro-batches a pass, idle 20.0% of the time"
    )
    assert "every stage computes all of first" in str(note(train, 5, "modernbert", stage=2))
    assert note(train, data=8) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: note(t, 6, stage=4), r"mesh\.stage: 6 layers do not divide into 4 stages; change mesh\.stage or"),
        (lambda t: note(t, 6, stage=2, rounds=2), r"6 layers do not divide into 2 stages × 2 rounds \(mesh\.rounds\)"),
        (
            lambda t: pipeline.choose(Layout(mesh=config.Mesh(stage=2)), make_mesh(config.Mesh(stage=2)), {}, t),
            r"mesh\.stage: 2 stages, and this model has no stacked layers",
        ),
        (lambda t: note(t, 2, stage=4), r"mesh\.stage: 4 stages for 2 layers; make mesh\.stage smaller"),
        (lambda t: note(t, stage=2, pipeline_micro=3), r"mesh\.pipeline_micro: 3 parts do not divide the 32 rows"),
        (lambda t: note(t, stage=4, data=2, rounds=1, pipeline_micro=32), r"mesh\.pipeline_micro: 32 parts"),
        (lambda t: note(t, 8, stage=4, rounds=2, pipeline_micro=2), r"mesh\.rounds: 2 rounds over 4 stages need at le"),
        (lambda t: note(t, rounds=2), r"mesh\.rounds: there is one stage; leave it out, or set mesh\.stage above 1"),
        (lambda t: note(t, rounds=0), r"mesh\.rounds: 0 is not a number of rounds"),
        (lambda t: pipeline.depth(2, 1, [5, 5, None, 5]), r"layers are of different kinds \(5, None\), in an order th"),
    ],
)
def test_what_does_not_divide_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(config.Train(batch_size=32))


@pytest.mark.parametrize("mesh", ["stage x data", *(pytest.param(m, marks=pytest.mark.slow) for m in EXPLICIT)])
def test_stages_merge_their_rows_for_cudnn(monkeypatch, mesh: str) -> None:
    """With XLA in the place of cuDNN, whose rule in JAX takes no mask that heads share."""
    wanted, plain, rows = expected("llama"), jax.nn.dot_product_attention, []

    def kernel(q, k, v, *, mask, implementation, **more):
        assert implementation == "cudnn" and mask.shape[0] == len(q) and mask.shape[1] == 1
        rows.append(len(q))
        return plain(q, k, v, mask=mask, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    choice = attention.AttentionChoice("cudnn", "a stand-in", "this is mapped over workers or stages")
    monkeypatch.setattr(attention, "choose", lambda *_, **__: choice)
    same(update.__wrapped__("llama", MESHES[mesh]), wanted)
    stages = MESHES[mesh].stage
    assert max(rows) == stages * min(rows), "a call has the rows of all stages"
