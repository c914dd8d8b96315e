"""Rows whose positions are split among devices: the same values and gradients, however keys and queries meet."""

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import config
from jaxlm.nn import ring_attention
from jaxlm.nn.attention import attend
from jaxlm.nn.layout import Layout
from jaxlm.nn.mask import Mask
from jaxlm.runtime.mesh import make_mesh, on_mesh

T, B, H, K, C = 32, 2, 4, 2, 4


def layout(mesh: config.Mesh) -> Layout:
    return Layout.of(mesh, config.Execution(dtype="float32"))


def case(name: str) -> tuple[dict, dict, dict]:
    """(arrays that are differentiated, arrays of the mask, everything else) of a request."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    S = 16 if "cross" in name else T
    given = dict(q=normal(B, T, H, C), k=normal(B, S, K, C), v=normal(B, S, K, 6 if "wide" in name else C))
    given["pull"] = normal(B, T, H, given["v"].shape[-1])
    mask: dict = {}
    if "packed" in name:
        own = np.sort(rng.integers(1, 4, (B, T)), -1).astype(np.int32)
        own[:, -3:] = 0
        mask |= dict(segments_BT=own, segments_BS=own)
    if "cross" in name:
        mask |= dict(segments_BT=np.repeat([[1, 2]], T // 2, 1).repeat(B, 0).astype(np.int32),
                     segments_BS=np.repeat([[1, 2]], S // 2, 1).repeat(B, 0).astype(np.int32))  # fmt: skip
    if "prefix" in name:
        mask["prefix_BS"] = np.arange(S)[None] < np.array([[5], [17]])
    if "bias" in name:
        given["bias"] = normal(1 if "shared" in name else B, H, T, S)
    if "sinks" in name:
        given["sinks"] = normal(H)
    window = next((int(word[6:]) for word in name.split() if word.startswith("window")), None)
    fixed = dict(causal="causal" in name, window=window, softcap=2.0 if "capped" in name else None)
    return given, mask, fixed


def both(mesh: config.Mesh | None, name: str) -> dict:
    """The result and what it pulls back to every input."""
    given, mask, fixed = case(name)
    shard = layout(mesh or config.Mesh())
    homes = dict(
        q=("batch", "seq", "heads", None), k=("batch", "seq", "kv", None), v=("batch", "seq", "kv", None),
        pull=("batch", "seq", "heads", None), bias=(None if "shared" in name else "batch", "heads", "seq", None),
        sinks=("heads",),
    )  # fmt: skip

    def f(given: dict, mask: dict) -> dict:
        pull = given.pop("pull")

        def out(x: dict) -> jax.Array:
            m = Mask(fixed["causal"], fixed["window"], **mask)
            more = dict(bias_BHTS=x.get("bias"), sinks_H=x.get("sinks"), softcap=fixed["softcap"])
            return attend(x["q"], x["k"], x["v"], m, shard=shard, **more)

        y, back = jax.vjp(out, given)
        return dict(out=y) | back(pull)[0]

    devices = make_mesh(mesh) if mesh else None
    with on_mesh(devices):
        if devices is not None:
            place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(devices, shard.spec(axes)))  # noqa: E731
            given = {n: place(x, *homes[n]) for n, x in given.items()}
            mask = {n: place(x, "batch", "seq") for n, x in mask.items()}
        run = jax.jit(f).lower(given, mask).compile()
        return jax.device_get(run(given, mask)) | {"hlo": run.as_text()}


@cache
def expected(name: str) -> dict:
    return both(None, name)


CASES = [
    "causal",
    "causal packed",
    "all packed",
    "cross packed wide",
    "causal window5 packed",
    "causal window20 packed",
    "window6",
    "causal prefix packed",
    "causal packed bias shared",
    "all bias capped",
    "causal sinks capped wide",
]


def close(got: dict, want: dict) -> None:
    for name in want.keys() - {"hlo"}:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=2e-5, err_msg=name)


# Rows of one document, a shared bias and sinks go round by default in the tests below; on four devices a short window
# and none have the plan of a wide one.
BELOW = ("causal", "causal packed", "causal window5 packed", "causal packed bias shared", "causal sinks capped wide")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in BELOW)) for n in CASES])
def test_a_ring_equals_one_device(name: str) -> None:
    """Its keys and values are on no device together: they travel."""
    got = both(config.Mesh(data=2, context=4, context_by="ring"), name)
    close(got, expected(name))
    assert "collective-permute" in got["hlo"] and "all-gather" not in got["hlo"]


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        pytest.param(config.Mesh(context=8), "causal packed", marks=pytest.mark.slow),
        (config.Mesh(context=8), "causal window5 packed"),  # a ring that the window shortens
        (config.Mesh(context=2, tensor=2, data=2, axis_type="explicit"), "causal sinks capped wide"),
        (config.Mesh(context=2, tensor=2, fsdp=2), "causal packed bias shared"),
    ],
)
def test_rings_of_other_meshes(mesh: config.Mesh, name: str) -> None:
    close(both(dataclasses.replace(mesh, context_by="ring"), name), expected(name))


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        (config.Mesh(data=2, context=4), "cross packed wide"),
        (config.Mesh(context=2, tensor=2, data=2, axis_type="explicit"), "causal sinks capped wide"),
        (config.Mesh(context=2, tensor=2, fsdp=2), "causal packed bias shared"),
        (config.Mesh(context=4, fsdp=2), "causal window5 packed"),
    ],
)
def test_heads_for_positions_equal_one_device(mesh: config.Mesh, name: str) -> None:
    got = both(dataclasses.replace(mesh, context_by="heads"), name)
    close(got, expected(name))
    assert "all-to-all" in got["hlo"]


def test_long_rows_are_worked_on_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_attention, "MAX_SCORES", 8)
    got = both(config.Mesh(data=2, context=4, context_by="ring"), "causal packed bias shared")
    close(got, expected("causal packed bias shared"))


# ------------------------------------------------------------------------------------------------------------ the plan


def plan(n: int, mask: Mask, length: int = 64) -> ring_attention.Plan:
    shard = layout(config.Mesh(context=n, data=1, context_by="ring"))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((n,), ("context",))):
        return ring_attention.plan(mask, shard, length, length, 1.0, None)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_under_a_causal_mask_every_device_has_the_same_work(n: int) -> None:
    """And all that may be seen is met: counted in parts of 1 / 2n of the row."""
    p = plan(n, Mask(True), 2 * n)
    met: dict[int, list[tuple[int, int]]] = {}
    part = lambda device, side: device if side == 0 else 2 * n - 1 - device  # noqa: E731
    for own in range(n):
        met[own] = []
        for i in range(p.stops):
            source = (own - p.first - i) % n
            side = 0 if source < own else 1
            pairs = [(0, 0), (1, 0), (1, 1)] if i == 0 else [(1, 0), (side, side)]
            met[own] += [(part(own, a), part(source, z)) for a, z in pairs]
    assert len({len(pairs) for pairs in met.values()}) == 1
    assert sorted(itertools.chain(*met.values())) == [(a, z) for a in range(2 * n) for z in range(a + 1)]


@pytest.mark.parametrize(
    ("mask", "parts", "first", "stops"),
    [
        (Mask(True), 2, 0, 8),
        (Mask(True, 9), 1, 0, 2),
        (Mask(True, 10), 1, 0, 3),
        (Mask(True, 60), 2, 0, 8),
        (Mask(False, 9), 1, -1, 3),
        (Mask(False), 1, 0, 8),
    ],
)
def test_a_window_shortens_the_ring(mask: Mask, parts: int, first: int, stops: int) -> None:
    p = plan(8, mask)
    assert (p.parts, p.first, p.stops) == (parts, first, stops)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plan(8, Mask(True), 24),
            r"mesh\.context_by: ring cuts rows into 16 parts, .*make train\.seq_len a mult",
        ),
        (lambda: plan(8, Mask(False), 20), r"mesh\.context: 20 positions of queries do not divide over 8 devices"),
        (lambda: plan(4, Mask(True, common=2)), r"mesh\.context_by: ring has no keys that all rows share"),
        (lambda: both(config.Mesh(context=8, context_by="heads"), "causal"), r"mesh\.context_by: heads: 4 heads of qu"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_memory_of_a_ring_falls_with_its_devices() -> None:
    """Gathered, keys and scores of all positions are on every device; in a ring those of one part."""

    def temporaries(by: str) -> int:
        mesh = make_mesh(config.Mesh(context=8))
        shard = layout(config.Mesh(context=8, context_by=by))  # type: ignore[arg-type]
        where = jax.NamedSharding(mesh, shard.spec(("batch", "seq", "heads", None)))
        x = jax.ShapeDtypeStruct((1, 2048, 1, 16), jnp.float32, sharding=where)
        loss = lambda q, k, v: attend(q, k, v, Mask(True), shard=shard).sum()  # noqa: E731
        with on_mesh(mesh):
            return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("ring") < 0.5 * temporaries("gather")
