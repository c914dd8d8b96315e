"""Costs by arithmetic: what the specs and tables imply, in well under two seconds for any size."""

import dataclasses
import math
import time

import pytest

from jaxlm.core import config
from jaxlm.models import llama, mixtral
from jaxlm.nn.moe import Moe
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, plan, roofline, targets

LLAMA_70B = llama.Config(vocab=32000, layers=80, width=8192, heads=64, kv_heads=8, head_width=128, ffn=28672)


def run(model=LLAMA_70B, batch: int = 1024, seq: int = 4096, micro: int = 1, remat: str = "full", **mesh) -> config.Run:
    return config.Run(
        name="x", model=model, objective=causal.Config(), mesh=config.Mesh(**mesh),
        train=config.Train(batch_size=batch, seq_len=seq, micro_batches=micro),
        execution=config.Execution(dtype="bfloat16", remat=remat),
    )  # fmt: skip


def sent(c: roofline.Cost, kind: str, axes: tuple[str, ...]) -> float:
    return sum(f.sent for f in c.flows if (f.kind, f.axes) == (kind, axes))


def test_70b_in_less_than_two_seconds() -> None:
    t, started = targets.parse("v6e:16x16"), time.process_time()
    c = ahead_of_time.estimate(run(fsdp=-1), t)
    assert time.process_time() - started < 2
    parameters, norms = 68_976_648_192, 161 * 8192  # norms rest whole
    held = (parameters - norms) / 256 + norms
    assert c.memory["parameters"] == 4 * held
    assert c.memory["optimizer state"] == pytest.approx(8 * held, rel=1e-6)
    # 6 for each weight, 2 more for those of the layers, which are computed again, and attention's two products.
    tokens = 1024 * 4096 / 256
    assert c.flops == pytest.approx(8 * parameters * tokens, rel=0.12)


def test_fsdp_gathers_each_weight_twice_and_scatters_its_gradient_once() -> None:
    c = ahead_of_time.estimate(run(fsdp=-1), targets.parse("v6e:16x16"))
    matrices = 2 * 80 * (8192 * (64 + 8 + 8 + 64) * 128 + 3 * 8192 * 28672)  # bytes in bfloat16
    tables = 2 * 32000 * 8192  # the head's: of the embedding's only the rows that are looked up travel
    share = 255 / 256
    assert sent(c, "all-gather", ("fsdp",)) == pytest.approx((2 * matrices + tables) * share)
    assert sent(c, "reduce-scatter", ("fsdp",)) == pytest.approx((matrices + tables) * share)
    assert sent(c, "all-to-all", ("fsdp",)) == pytest.approx(2 * 2 * 4096 * 1024 / 256 * 8192 * share)
    kept = ahead_of_time.estimate(run(fsdp=-1, remat="none"), targets.parse("v6e:16x16"))
    assert sent(kept, "all-gather", ("fsdp",)) == sent(c, "all-gather", ("fsdp",))
    twice = ahead_of_time.estimate(run(fsdp=-1, micro=2), targets.parse("v6e:16x16"))
    assert sent(twice, "reduce-scatter", ("fsdp",)) == pytest.approx(2 * (matrices + tables) * share)


def test_tensor_parallelism_sums_activations_and_waits_for_them_on_a_gpu() -> None:
    c = ahead_of_time.estimate(run(fsdp=-1, tensor=8), targets.parse("h100:8x8"))
    each = 2 * (1024 * 4096 / 8) * 8192  # bytes of a sum; two a layer, each forward, again, and backward
    assert sent(c, "all-reduce", ("tensor",)) == pytest.approx(80 * 2 * 3 * each * 2 * 7 / 8)
    assert not next(f for f in c.flows if f.axes == ("tensor",)).hidden
    assert c.times["waited"] > 0
    on_tpu = ahead_of_time.estimate(run(fsdp=-1, tensor=8), targets.parse("v5p:4x4x4"))
    assert [f.what for f in on_tpu.flows if not f.hidden] == ["rows looked up"] and sent(
        on_tpu, "all-reduce", ("tensor",)
    ) == sent(c, "all-reduce", ("tensor",))
    assert on_tpu.memory["parameters"] == c.memory["parameters"]


def test_replicas_reduce_gradients_and_store_everything() -> None:
    small = dataclasses.replace(LLAMA_70B, layers=2, vocab=512)
    c = ahead_of_time.estimate(run(small, batch=64, data=8), targets.parse("h100:8"))
    whole = 4 * (2 * (8192 * 144 * 128 + 3 * 8192 * 28672 + 2 * 8192) + 2 * 512 * 8192 + 8192)
    assert c.memory["parameters"] == whole and c.memory["optimizer state"] == pytest.approx(2 * whole, rel=1e-6)
    assert sent(c, "all-reduce", ("data",)) == pytest.approx(whole / 2 * 2 * 7 / 8)
    frozen = dataclasses.replace(run(small, batch=64, data=8), optim=config.Optim(freeze=("blocks",)))
    assert ahead_of_time.estimate(frozen, targets.parse("h100:8")).memory["gradients"] == 4 * (2 * 512 * 8192 + 8192)


def test_experts_cost_what_a_token_meets() -> None:
    mixture = mixtral.Config(vocab=32000, layers=2, width=1024, heads=8, kv_heads=8, head_width=128,
                             moe=Moe(experts=8, top_k=2, ffn=4096))  # fmt: skip
    one = dataclasses.replace(mixture, moe=Moe(experts=8, top_k=1, ffn=4096))
    t = targets.parse("v5e:2x2")
    two, single = (ahead_of_time.estimate(run(m, batch=8, expert=4, replicated=(".*",)), t) for m in (mixture, one))
    assert two.memory["parameters"] == single.memory["parameters"]
    assert two.flops - single.flops == pytest.approx(8 * 2 * 3 * 1024 * 4096 / 4 * 8 * 4096, rel=1e-6)
    each = 8 / 4 * 4096 * 1024 * 2 * 3 / 4  # bytes of one choice of this device's tokens that go to other devices
    again = 3 if run().execution.remat == "full" else 2
    assert sent(two, "all-to-all", ("expert",)) == pytest.approx(2 * again * 2 * 2 * each)
    here = ahead_of_time.estimate(run(mixture, batch=8, expert=4, expert_dispatch="replicate", replicated=(".*",)), t)
    assert here.flops > two.flops and sent(here, "all-reduce", ("expert",)) > 0


def test_bandwidth_of_an_axis_that_leaves_the_node_or_the_slice() -> None:
    h100, two = targets.parse("h100:4x8"), targets.parse("2*v6e:16x16")
    sizes = {"data": 1, "fsdp": 32, "tensor": 1}
    assert roofline.bandwidth(h100, ("fsdp",), sizes) == ("NIC", 8 * 50e9)  # each of a node's devices carries an eighth
    sizes = {"data": 4, "fsdp": 1, "tensor": 8}
    assert roofline.bandwidth(h100, ("tensor",), sizes) == ("NVLink", 450e9)
    assert roofline.bandwidth(h100, ("data",), sizes) == ("NIC", 50e9)
    sizes = {"data": 2, "fsdp": 256, "tensor": 1}
    assert roofline.bandwidth(two, ("fsdp",), sizes) == ("ICI", 4 * 90e9)  # two links in each of two dimensions
    assert roofline.bandwidth(two, ("data",), sizes) == ("DCN", 12.5e9)
    sizes = {"data": 2, "fsdp": 16, "tensor": 16}
    assert roofline.bandwidth(two, ("tensor",), sizes) == ("ICI", 2 * 90e9)


def test_times_add_up_as_stated() -> None:
    t = targets.parse("h100:8")
    c = ahead_of_time.estimate(run(dataclasses.replace(LLAMA_70B, layers=4), batch=64, fsdp=-1, tensor=2), t)
    times = c.times
    assert times["compute"] == pytest.approx(c.flops / (989.4e12 * t.chip.efficiency))
    gaps = times["launches"]
    assert times["step"] == pytest.approx(times["compute"] + times["memory"] + gaps + times["waited"])
    slow = dataclasses.replace(t, chip=dataclasses.replace(t.chip, link=1e9))
    behind = roofline.combine(c, slow, {"fsdp": 4, "tensor": 2})
    assert behind.times["step"] > times["step"] and behind.times["step"] == pytest.approx(behind.times["NVLink"])
    piped = roofline.combine(dataclasses.replace(c, bubble=0.2), t, {"fsdp": 4, "tensor": 2})
    assert piped.times["step"] == pytest.approx(times["step"] / 0.8)
    speed = c.speed(8, t.chip.flops)
    assert speed["tokens_per_s"] == pytest.approx(64 * 4096 / times["step"])
    assert 0 < speed["mfu_causal"] < speed["mfu_full"] < t.chip.efficiency * 1.2


def test_what_no_table_knows_has_no_times_but_bytes() -> None:
    c = ahead_of_time.estimate(
        run(dataclasses.replace(LLAMA_70B, layers=1, vocab=512), batch=8, data=8), targets.parse("cpu:8")
    )
    assert c.times == {} and c.peak > 0 and math.isfinite(c.hbm)


def test_a_mesh_that_does_not_divide_is_refused_as_in_training() -> None:
    with pytest.raises(ValueError, match="mesh: fsdp 7 does not fit 8 devices"):
        ahead_of_time.estimate(run(batch=8, data=1, fsdp=7), targets.parse("h100:8"))
    odd = dataclasses.replace(LLAMA_70B, heads=66, kv_heads=6)
    with pytest.raises(ValueError, match="mesh: blocks/k has 6 kv, which 4 devices of tensor do not divide"):
        ahead_of_time.estimate(run(odd, batch=8, tensor=4, fsdp=2), targets.parse("h100:8"))


def test_each_kind_of_remat_keeps_what_it_names() -> None:
    """Of the 70B shape: 80 layers 8192 wide, 64 heads of 128 and 8 of keys and values, in bfloat16; 4096 tokens."""
    kinds = ("full", "qkv", "attention", "dots", "none")
    kept = [
        ahead_of_time.estimate(run(fsdp=-1, remat=r), targets.parse("v6e:16x16")).memory["activations"] for r in kinds
    ]
    assert kept == sorted(kept) and len(set(kept)) == 5
    each = kept[0] / 8192  # of one element of a token, in all layers
    assert kept[1] - kept[0] == pytest.approx((64 + 8 + 8) * 128 * each)
    assert kept[2] - kept[1] == pytest.approx(
        (64 * 128 + 8192) * each
    )  # what attention gives, and the product after it


def test_what_rests_in_the_hosts_memory_is_none_of_the_devices_and_travels_each_step() -> None:
    t, model = targets.parse("h100"), llama.Config(vocab=512, layers=4, width=256, heads=4, kv_heads=2, head_width=64,
                                                   ffn=512)  # fmt: skip
    here = run(model, batch=8, seq=128, remat="attention")
    there = dataclasses.replace(
        here, execution=dataclasses.replace(here.execution, offload=("optimizer", "input", "q", "k"))
    )
    before, after = ahead_of_time.estimate(here, t), ahead_of_time.estimate(there, t)
    assert after.host["optimizer state"] == before.memory["optimizer state"] and not before.host
    assert after.memory["optimizer state"] == 0.0
    activations = 2 * (256 + 4 * 64 + 2 * 64) * 4 * 8 * 128
    assert after.host["activations"] == activations
    assert before.memory["activations"] - after.memory["activations"] == activations
    copied = {f.what: (f.sent, f.hidden) for f in after.flows if f.kind == roofline.HOST}
    state = before.memory["optimizer state"]
    assert copied == {"optimizer state": (2 * state, False), "activations": (2 * activations, True)}
    assert after.times["copied"] == 2 * state / t.chip.to_host and before.times["copied"] == 0.0
    # A TPU's link to its host isn't known, and no time is made up for it.
    tpu = targets.parse("v5p:2x2x1")
    assert "host link" not in ahead_of_time.estimate(there, tpu).times
    assert ahead_of_time.estimate(there, tpu).times["copied"] == 0.0


def test_small_steps_on_a_gpu_wait_for_their_kernels() -> None:
    small = llama.Config(vocab=512, layers=32, width=64, heads=1, kv_heads=1, head_width=64, ffn=64)
    gpu, tpu = (ahead_of_time.estimate(run(small, batch=1, seq=64), targets.parse(t)) for t in ("h100", "v5e:1x1"))
    assert gpu.kernels == roofline.KERNELS * 33 and tpu.kernels == 0.0
    assert gpu.times["launches"] == gpu.kernels * roofline.LAUNCH
    assert plan.bottleneck(gpu).startswith("gaps between kernels")


@pytest.mark.parametrize(
    ("way", "target", "share"), [("mxfp8", "b200:8", 1.0), ("fp8", "h100:8", 1.0), ("int8", "v6e:2x4", 0.75)]
)
def test_products_of_layers_in_eight_bits_take_the_time_of_the_chips_own_rate(
    way: str, target: str, share: float
) -> None:
    """Four layers of 80 stay out; of int8 the gradients of weights too: two of eight FLOPs a weight."""
    t, plain = targets.parse(target), run(fsdp=8)
    e = dataclasses.replace(plain.execution, matmul=way, matmul_skip_first=1, matmul_skip_last=3)
    wide, c = (ahead_of_time.estimate(r, t) for r in (plain, dataclasses.replace(plain, execution=e)))
    matrices = 76 * (8192 * (64 + 8 + 8 + 64) * 128 + 3 * 8192 * 28672)
    assert wide.narrow == 0 and c.flops == wide.flops
    assert c.narrow == pytest.approx(8 * share * matrices * 1024 * 4096 / 8)
    saved = c.narrow * (1 / t.chip.flops - 1 / t.chip.low) / t.chip.efficiency
    assert wide.times["compute"] - c.times["compute"] == pytest.approx(saved)
