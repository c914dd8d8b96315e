"""Mixture of experts: routing by a plain loop, experts by a dense sum, losses by row, and meshes like one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config, spec
from jaxlm.nn import block_stack, expert_parallel, moe
from jaxlm.nn.kernels import grouped_matmul
from jaxlm.nn.layout import Layout
from jaxlm.nn.moe import Moe
from jaxlm.runtime.mesh import make_mesh, on_mesh

B, T, D = 4, 16, 8
ROUTERS = {
    "mixtral": Moe(experts=8, top_k=2, ffn=12),
    "plain": Moe(experts=8, top_k=3, ffn=12, normalized=False),
    "deepseek v2": Moe(experts=8, top_k=3, ffn=12, normalized=False, groups=4, top_groups=2, scale=2.5),
    "deepseek v3": Moe(
        experts=8, top_k=3, ffn=12, score="sigmoid", groups=4, top_groups=2, scale=2.5, selection_bias=True
    ),
}


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


def make(c: Moe, biases: bool = False, seed: int = 0):
    specs = moe.specs(c, D, biases=biases)
    rng = np.random.default_rng(seed)
    p = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) / 2, specs, is_leaf=spec.is_spec)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    segments = np.ones((B, T), np.int32)
    segments[1, 10:] = 0
    segments[2, :3] = 0
    return specs, p, x, segments


LAYOUT = Layout(execution=config.Execution(dtype="float32"))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def route_one(c: Moe, logits, bias):
    """One token, by the definition."""
    score = softmax(logits) if c.score == "softmax" else 1 / (1 + np.exp(-logits))
    merit = score + (0 if bias is None else bias)
    size = c.experts // c.groups
    groups = [merit[g * size : (g + 1) * size] for g in range(c.groups)]
    worth = [np.sort(g)[-2:].sum() if c.score == "sigmoid" else g.max() for g in groups]
    open_groups = sorted(range(c.groups), key=lambda g: -worth[g])[: c.top_groups]
    allowed = [e for e in range(c.experts) if e // size in open_groups]
    chosen = sorted(allowed, key=lambda e: -merit[e])[: c.top_k]
    weights = score[chosen] / (score[chosen].sum() if c.normalized else 1)
    return chosen, weights * c.scale


def silu(x):
    return x / (1 + np.exp(-x))


def expert_one(p, e, x):
    get = lambda n: p["experts"][f"{n}_bias"][e] if f"{n}_bias" in p["experts"] else 0.0  # noqa: E731
    w = {n: p["experts"][n][e] for n in ("gate", "up", "down")}
    return (silu(x @ w["gate"] + get("gate")) * (x @ w["up"] + get("up"))) @ w["down"] + get("down")


def plain_loop(c: Moe, p, x):
    out = np.zeros_like(x)
    for b in range(B):
        for t in range(T):
            logits = x[b, t] @ p["router"] + p.get("router_bias", 0)
            for e, w in zip(*route_one(c, logits, p.get("selection_bias")), strict=True):
                out[b, t] += w * expert_one(p, e, x[b, t])
    return out


@pytest.mark.parametrize(("name", "biases"), [*[(name, False) for name in ROUTERS], ("mixtral", True)])
def test_every_token_gets_the_sum_of_its_experts(name, biases):
    c = ROUTERS[name]
    _, p, x, segments = make(c, biases)
    y, tally = jax.jit(lambda p, x: moe.mixture(c, p, x, segments, shard=LAYOUT))(p, x)
    np.testing.assert_allclose(y, plain_loop(c, p, x), atol=2e-5)
    assert not np.asarray(tally.dropped_B).any()


def all_experts(c: Moe, p, x):
    """Every expert for every token, weighed: plain autodiff."""
    weights, chosen, _ = moe.route(c, jnp.einsum("btd,de->bte", x, p["router"]), p.get("selection_bias"))
    share = (jax.nn.one_hot(chosen, c.experts) * weights[..., None]).sum(-2)
    w = p["experts"]
    gate, up = (jnp.einsum("btd,edf->btef", x, w[n]) for n in ("gate", "up"))
    return jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, w["down"], share)


@functools.cache
def gradients_of_all_experts(name):
    _, p, x, _ = make(ROUTERS[name])
    return jax.jit(jax.grad(lambda p, x: jnp.square(all_experts(ROUTERS[name], p, x)).sum(), (0, 1)))(p, x)


@pytest.mark.parametrize(("name", "how"), [("mixtral", "blocks"), ("deepseek v3", "blocks"), ("mixtral", "kernel")])
def test_gradients_equal_those_of_all_experts(name, how, monkeypatch):
    """Of experts, router and tokens, whichever way experts are multiplied."""
    monkeypatch.setattr(grouped_matmul, "choose", lambda: grouped_matmul.GroupedMatmulChoice(how, ""))
    monkeypatch.setattr(grouped_matmul, "INTERPRET", True)
    c = ROUTERS[name]
    _, p, x, segments = make(c)
    ours = lambda p, x: jnp.square(moe.mixture(c, p, x, segments, shard=LAYOUT)[0]).sum()  # noqa: E731
    got, expected = jax.jit(jax.grad(ours, (0, 1)))(p, x), gradients_of_all_experts(name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), got, expected)
    assert np.abs(got[0]["router"]).max() > 1


@pytest.mark.parametrize(("tokens", "how"), [(1, "blocks"), (700, "blocks"), (700, "kernel")])
def test_any_number_of_tokens(tokens, how, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "choose", lambda: grouped_matmul.GroupedMatmulChoice(how, ""))
    monkeypatch.setattr(grouped_matmul, "INTERPRET", True)
    c = ROUTERS["mixtral"]
    _, p, _, _ = make(c)
    x = np.random.default_rng(1).standard_normal((1, tokens, D)).astype(np.float32)
    run = jax.jit(lambda p, x: moe.mixture(c, p, x, None, shard=LAYOUT)[0])

    @jax.jit
    def expected(p, x):
        logits = jnp.einsum("btd,de->bte", x, p["router"]) + p["router_bias"][None, None]
        weights, chosen, _ = moe.route(c, logits)
        share = (jax.nn.one_hot(chosen, 8) * weights[..., None]).sum(-2)
        w = p["experts"]
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, w["gate"])) * jnp.einsum("btd,edf->btef", x, w["up"])
        return jnp.einsum("btef,efd,bte->btd", h, w["down"], share)

    for skew in (0.0, 100.0):  # all tokens at the same experts
        q = p | {"router_bias": np.array([skew, 0, 0, skew, 0, 0, 0, 0], np.float32)}
        np.testing.assert_allclose(run(q, x), expected(q, x), atol=1e-4)


def with_capacity(c: Moe, p, x, segments):
    """By a loop: (output, share of choices dropped in each row)."""
    out, dropped = np.zeros_like(x), np.zeros(B)
    for b in range(B):
        picks = [route_one(c, x[b, t] @ p["router"], None) for t in range(T)]
        places = int(np.ceil(c.capacity * (segments[b] > 0).sum() * c.top_k / c.experts))
        taken = np.zeros(c.experts, int)
        for k in range(c.top_k):
            for t in range(T):
                if not segments[b, t]:
                    continue
                e = picks[t][0][k]
                if taken[e] < places:
                    taken[e] += 1
                    out[b, t] += picks[t][1][k] * expert_one(p, e, x[b, t])
                else:
                    dropped[b] += 1
        dropped[b] /= c.top_k * (segments[b] > 0).sum()
    return out, dropped


@pytest.mark.parametrize("capacity", [0.5, 8.0])
def test_capacity_drops_what_finds_no_place_and_says_how_much(capacity):
    c = dataclasses.replace(ROUTERS["mixtral"], capacity=capacity)
    _, p, x, segments = make(c)
    y, tally = jax.jit(lambda p, x: moe.mixture(c, p, x, segments, shard=LAYOUT))(p, x)
    expected, dropped = with_capacity(c, p, x, segments)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(tally.dropped_B, dropped, atol=1e-6)
    assert (dropped.max() > 0.2) == (capacity < 1)
    longer = ((0, 0), (0, 5))
    wider, behind = np.pad(x, (*longer, (0, 0)), constant_values=1), np.pad(segments, longer)
    _, more = jax.jit(lambda p, x: moe.mixture(c, p, x, behind, shard=LAYOUT))(p, wider)
    np.testing.assert_allclose(more.dropped_B, dropped, atol=1e-6, err_msg="padding makes no places")
    free, _ = jax.jit(lambda p, x: moe.mixture(c, p, x, segments, shard=LAYOUT, may_drop=False))(p, x)
    np.testing.assert_allclose(free, plain_loop(c, p, x), atol=2e-5)


def test_balance_and_z_loss_of_each_row_over_its_real_tokens():
    c = Moe(experts=8, top_k=2, ffn=12, balance=0.3, router_z=0.2)
    _, p, x, segments = make(c)
    _, tally = jax.jit(lambda p, x: moe.mixture(c, p, x, segments, shard=LAYOUT))(p, x)
    for b in range(B):
        logits = x[b][segments[b] > 0] @ p["router"]
        share = np.zeros(8)
        for z in logits:
            share[route_one(c, z, None)[0]] += 1 / (2 * len(logits))
        score = np.mean([softmax(z) for z in logits], 0)
        z_loss = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
        np.testing.assert_allclose(tally.aux_B[b], 0.3 * 8 * (share * score).sum() + 0.2 * z_loss, rtol=1e-5)


def test_padding_changes_no_loss():
    c = Moe(experts=8, top_k=2, ffn=12, balance=0.3, router_z=0.2, capacity=1.0)
    _, p, x, segments = make(c)
    other = np.where(segments[..., None] > 0, x, 7.0).astype(np.float32)
    run = jax.jit(lambda x: moe.mixture(c, p, x, segments, shard=LAYOUT))
    (y1, t1), (y2, t2) = run(x), run(other)
    jax.tree.map(np.testing.assert_array_equal, t1, t2)
    np.testing.assert_array_equal(np.asarray(y1)[segments > 0], np.asarray(y2)[segments > 0])


def test_routers_stay_exact_in_bfloat16():
    """Their weights are not rounded with the others, so tokens go where float32 sends them."""
    specs = dict(
        router=spec.Spec((D, 8), ("embed", "router"), spec.zeros),
        up=spec.Spec((D, 8), ("embed", "ffn"), spec.zeros),
    )
    weights = {n: jnp.full((1, D, 8), 1 + 2**-12) for n in specs}
    stacked = spec.stacked(1, specs)
    seen = {}

    def block(p, x, rows, key, kind, kept):
        seen.update(p)
        return x, None

    layout = Layout(execution=config.Execution(dtype="bfloat16", scan=False))
    block_stack.run_blocks(block, weights, stacked, jnp.zeros(1), shard=layout, key=None)
    assert seen["router"].dtype == jnp.float32 and seen["up"].dtype == jnp.bfloat16


MESHES = {
    "expert": config.Mesh(data=1, expert=8),
    "expert 4": config.Mesh(data=2, expert=4),
    "data x expert x tensor": config.Mesh(data=2, expert=2, tensor=2),
    "expert x tensor, cut": config.Mesh(data=2, expert=2, tensor=2, compute=("stream=context+tensor",)),
    "fsdp x context x expert": config.Mesh(fsdp=2, context=2, expert=2),
}


@functools.cache
def gradients(
    capacity: float | None, mesh: str | None = None, axis_type: str = "explicit", how: str = "", rows: int = B
):
    """Of a mixture with biases and all that a router can have: (outputs, losses and gradients; the program's text)."""
    c = dataclasses.replace(ROUTERS["deepseek v3"], capacity=capacity, router_z=0.1, balance=0.5)
    specs, p, x, segments = make(c, biases=True)
    if rows == 8:
        x, segments = (np.concatenate([a, a[:, ::-1]]) for a in (x, segments))
    mc = config.Mesh() if mesh is None else dataclasses.replace(MESHES[mesh], axis_type=axis_type)
    if rows == B:  # which eight devices can't share
        mc = dataclasses.replace(mc, expert_dispatch="replicate")
    m = make_mesh(mc, jax.devices()[:1] if mesh is None else jax.devices())
    layout = Layout.of(mc, LAYOUT.execution)

    def f(p, x, segments):
        y, tally = moe.mixture(c, layout.gather(p, specs), x, segments, shard=layout)
        return jnp.square(y).sum() + tally.aux_B.sum(), (y, tally)

    with on_mesh(m):
        if m is not None:
            homes = [jax.sharding.NamedSharding(m, layout.spec(("batch", "seq", *[None] * n))) for n in (1, 0)]
            x, segments = (jax.device_put(a, s) for a, s in zip((x, segments), homes, strict=True))
        p = jax.tree.map(jax.device_put, p, layout.shardings(specs, m))
        program = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)).lower(p, x, segments).compile()
        return jax.device_get(program(p, x, segments)), program.as_text()


@pytest.mark.parametrize(
    ("mesh", "axis_type", "capacity", "how"),
    [
        ("data x expert x tensor", "explicit", None, "kernel"),
        ("fsdp x context x expert", "auto", None, "blocks"),
        ("fsdp x context x expert", "explicit", 0.8, "fixed"),
        pytest.param("expert", "explicit", None, "blocks", marks=pytest.mark.slow),
        pytest.param("data x expert x tensor", "auto", 0.8, "fixed", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_what_one_device_gives(mesh, axis_type, capacity, how, monkeypatch):
    """Outputs, losses, dropped shares and every gradient; and no device ever gets the weights of all experts."""
    expected, _ = gradients(capacity)
    choice = grouped_matmul.GroupedMatmulChoice("kernel" if how == "kernel" else "blocks", "")
    monkeypatch.setattr(grouped_matmul, "choose", lambda: choice)
    monkeypatch.setattr(grouped_matmul, "INTERPRET", True)
    got, program = gradients(capacity, mesh, axis_type, how)
    # Gradients reach 800: a few of the last digits of float32 at such a size are more than the least bound.
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=max(2e-4, 1e-6 * abs(b).max()), rtol=2e-5)  # noqa: E731
    jax.tree.map(close, got, expected)
    moved = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", program)
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n])) for s in moved for dims in re.findall(r"\[([\d,]*)\]", s)
    ]
    assert max(sizes) < 8 * D * 12
    if "fsdp" in mesh:
        assert 4 * D * 12 in sizes  # its own experts, gathered from where they rest


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What the primitive does, by its documentation: no CPU has it."""
    everyone = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for x, begin, size, lands in zip(*everyone, strict=True):
        at = row - lands[me]
        theirs = x.at[begin[me] + at].get(mode="fill", fill_value=0)
        output = jnp.where(((at >= 0) & (at < size[me]))[:, None], theirs, output)
    return output


@pytest.mark.parametrize(
    ("mesh", "axis_type", "capacity", "how"),
    [
        # By default every mesh, axis type and way; `training/test_meshes.py` pads what travels on every other mesh.
        ("expert 4", "explicit", None, "ragged"),
        ("data x expert x tensor", "explicit", 0.8, "fixed"),
        ("expert x tensor, cut", "explicit", None, "padded"),
        ("fsdp x context x expert", "auto", 0.8, "fixed"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("expert", "explicit", None, "padded"),
                ("data x expert x tensor", "auto", None, "padded"),
                ("fsdp x context x expert", "explicit", None, "padded"),
                ("fsdp x context x expert", "explicit", None, "ragged"),
                ("data x expert x tensor", "auto", None, "ragged"),
                ("expert x tensor, cut", "auto", 0.8, "fixed"),
                ("expert", "auto", 0.8, "fixed"),
            ]
        ),
    ],
)
def test_tokens_that_travel_give_what_one_device_gives(mesh, axis_type, capacity, how, monkeypatch):
    """Outputs, losses, dropped shares and every gradient, where the expert axis shares the batch."""
    expected, _ = gradients(capacity, rows=8)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(expert_parallel, "choose", lambda: expert_parallel.ExchangeChoice(how, ""))
    got, program = gradients(capacity, mesh, axis_type, how, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * abs(b).max() + 1e-7), got, expected)
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)
    if how != "ragged":
        assert "all-to-all" in program


def test_half_of_the_experts_axes_may_not_share_the_batch():
    c = dataclasses.replace(
        MESHES["expert 4"], compute=("experts=data+expert", "batch=data"), store=("experts=data+expert",)
    )
    layout = Layout.of(c, LAYOUT.execution)
    _, p, x, segments = make(ROUTERS["mixtral"])
    with (
        on_mesh(make_mesh(c)),
        pytest.raises(ValueError, match=r"mesh\.compute: experts are over data\+"),
    ):
        jax.eval_shape(lambda p, x: moe.mixture(ROUTERS["mixtral"], p, x, segments, shard=layout), p, x)
