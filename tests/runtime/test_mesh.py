"""The mesh and the two tables: what fits is placed as said, and what doesn't is refused by name."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm.core import config, spec
from jaxlm.core.spec import Spec, normal, stacked
from jaxlm.nn.layout import COMPUTE, STORE, Layout, batch_sharding, check_batch
from jaxlm.nn.leaf import Leaf
from jaxlm.runtime.mesh import AXES, check_host_memory, make_mesh, on_mesh

SPECS = {
    "embed": Spec((32, 16), ("vocab", "embed"), normal(1)),
    "blocks": stacked(2, {"up": Spec((16, 24), ("embed", "ffn"), normal(1))}),
    "position": Spec((8, 12), (None, None), normal(1)),
}


def layout(**mesh) -> Layout:
    return Layout.of(config.Mesh(**mesh), config.Execution())


# ---------------------------------------------------------------------------------------------------------------- mesh


@pytest.mark.parametrize(
    ("c", "sizes"),
    [
        (config.Mesh(), {"data": 8}),
        (config.Mesh(fsdp=4), {"data": 2, "fsdp": 4}),
        (config.Mesh(fsdp=-1, tensor=2), {"data": 1, "fsdp": 4, "tensor": 2}),
        (config.Mesh(data=-1, replica=2), {"replica": 2, "data": 4}),
        (config.Mesh(data=2, context=2, tensor=2), {"data": 2, "context": 2, "tensor": 2}),
    ],
)
def test_sizes_of_the_mesh(c, sizes):
    mesh = make_mesh(c)
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | sizes
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_axis_type():
    assert set(make_mesh(config.Mesh(axis_type="explicit")).axis_types) == {AxisType.Explicit}


def test_one_device_needs_no_mesh():
    assert make_mesh(config.Mesh(), jax.devices()[:1]) is None


@pytest.mark.parametrize(
    ("c", "message"),
    [
        (config.Mesh(data=-1, fsdp=-1), r"mesh: only one axis may be -1, not data and fsdp"),
        (config.Mesh(fsdp=0), r"mesh\.fsdp: 0 is not a size"),
        (config.Mesh(tensor=-2), r"mesh\.tensor: -2 is not a size"),
        (config.Mesh(fsdp=3), r"mesh: .*fsdp 3.* does not fit 8 devices"),
        (config.Mesh(data=1, fsdp=4), r"mesh: fsdp 4 does not fit 8 devices"),
        (config.Mesh(data=16), r"mesh: data 16 does not fit 8 devices"),
        (config.Mesh(data=1), r"mesh: 1 does not fit 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(c, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(c)


def test_more_than_one_device_asked_of_one():
    with pytest.raises(ValueError, match=r"mesh: tensor 2 does not fit 1 devices"):
        make_mesh(config.Mesh(data=1, tensor=2), jax.devices()[:1])


# -------------------------------------------------------------------------------------------------------------- tables


def test_weights_rest_and_work_in_different_places():
    a = layout()
    assert a.spec(("vocab", "embed"), a.store) == P("tensor", "fsdp")
    assert a.spec(("vocab", "embed")) == P("tensor", None)
    assert a.spec(("batch", "seq", None)) == P(("replica", "data", "fsdp", "expert"), "context", None)
    assert layout(expert_dispatch="replicate").spec(("batch",)) == P(("replica", "data", "fsdp"))


def test_amendments_change_one_row_of_one_table():
    a = layout(store=("embed=fsdp+data", "vocab="), compute=("ffn=",))
    assert a.spec(("vocab", "embed"), a.store) == P(None, ("fsdp", "data"))
    assert a.spec(("ffn", "heads")) == P(None, "tensor")
    assert layout().store == STORE and layout().compute == COMPUTE


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"store": ("embed",)}, r"mesh\.store: 'embed' is not LOGICAL=MESH"),
        ({"store": ("embd=fsdp",)}, r"mesh\.store: 'embd=fsdp' .*did you mean 'embed'"),
        ({"store": ("embed=fsd",)}, r"mesh\.store: 'embed=fsd': no mesh axis 'fsd'; did you mean 'fsdp'"),
        ({"compute": ("seq=contxt",)}, r"mesh\.compute: .* did you mean 'context'"),
    ],
)
def test_amendments_that_name_nothing_are_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        layout(**mesh)


def test_one_mesh_axis_on_two_dimensions_is_refused():
    a = layout(store=("embed=tensor",))
    with pytest.raises(ValueError, match=r"would put one mesh axis on two dimensions"):
        a.shardings(SPECS, make_mesh(config.Mesh(tensor=2)))


def test_the_residual_stream_follows_the_sequence_unless_told_otherwise():
    plain, cut = layout(compute=("seq=context+data", "batch=fsdp")), layout(compute=("stream=context+tensor",))
    assert not plain.streams and plain.spec(("stream",)) == plain.spec(("seq",)) == P(("context", "data"))
    assert cut.streams and cut.spec(("seq",)) == P("context") and cut.spec(("stream",)) == P(("context", "tensor"))


@pytest.mark.parametrize(
    ("zero", "weights"), [(1, P("tensor", None)), (2, P("tensor", None)), (3, P("tensor", "fsdp"))]
)
def test_zero_leaves_weights_whole_and_moments_cut(zero, weights):
    a = layout(zero=zero)
    assert a.spec(("vocab", "embed"), a.store) == weights
    assert a.spec(("vocab", "embed"), a.moments) == P("tensor", "fsdp")


# ------------------------------------------------------------------------------------------------------------- weights


def test_shardings_of_stacked_weights():
    homes = layout().shardings(SPECS, make_mesh(config.Mesh(fsdp=4, tensor=2)))
    assert homes["blocks"]["up"].spec == P(None, "fsdp", "tensor")
    assert homes["position"].spec == P(None, None)
    placed = jax.device_put(np.zeros((2, 16, 24), np.float32), homes["blocks"]["up"])
    assert placed.addressable_shards[0].data.shape == (2, 4, 12)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (config.Mesh(tensor=8), None),
        (
            config.Mesh(data=1, tensor=-1, store=("layers=tensor", "ffn=", "vocab=")),
            r"blocks/up has 2 layers, which 8 dev",
        ),
        (config.Mesh(fsdp=8, store=("ffn=fsdp+tensor", "embed=data")), None),
    ],
)
def test_dimensions_that_do_not_divide_are_named(mesh, message):
    a = Layout.of(mesh, config.Execution())
    if message is None:
        a.shardings(SPECS, make_mesh(mesh))
        return
    with pytest.raises(ValueError, match=message):
        a.shardings(SPECS, make_mesh(mesh))


def test_layers_rest_with_their_stages_but_for_a_stack_too_small_to_be_cut():
    homes = layout().shardings(SPECS, make_mesh(config.Mesh(stage=2, fsdp=2, data=2)))
    assert homes["blocks"]["up"].shard_shape((2, 16, 24)) == (1, 8, 24)
    homes = layout().shardings(SPECS, make_mesh(config.Mesh(stage=4, fsdp=2)))
    assert homes["blocks"]["up"].shard_shape((2, 16, 24)) == (2, 8, 24)
    three = {"blocks": stacked(3, {"up": Spec((16, 24), ("embed", "ffn"), normal(1))})}
    with pytest.raises(ValueError, match=r"blocks/up has 3 layers, which 2 devices of stage do not divide"):
        layout().shardings(three, make_mesh(config.Mesh(stage=2)))


def test_a_dimension_that_does_not_divide_says_which_axis():
    odd = SPECS | {"head": Spec((30, 16), ("vocab", "embed"), normal(1))}
    with pytest.raises(ValueError, match=r"mesh: head has 30 vocab, which 4 devices of tensor do not divide"):
        layout().shardings(odd, make_mesh(config.Mesh(tensor=4)))


def test_a_large_weight_that_rests_whole_is_refused_unless_named():
    a, mesh = layout(), make_mesh(config.Mesh(fsdp=8))
    with pytest.raises(ValueError, match=r"mesh: position \(96 elements\) would rest unsharded .* mesh\.replicated"):
        a.check_sharded(SPECS, mesh, (), 95)
    a.check_sharded(SPECS, mesh, (), 96)
    a.check_sharded(SPECS, mesh, ("posi",), 95)
    a.check_sharded(SPECS, None, (), 0)
    a.check_sharded(SPECS, make_mesh(config.Mesh()), (), 0)  # data parallelism alone stores nothing sharded
    with pytest.raises(ValueError, match=r"mesh\.replicated: pattern 'nope' matches no parameter"):
        a.check_sharded(SPECS, mesh, ("nope",), 95)


# --------------------------------------------------------------------------------------------------------------- batch


def test_batches_are_split_by_rows_and_positions():
    mesh = make_mesh(config.Mesh(data=2, context=4))
    tokens = batch_sharding(layout(), mesh, (2, 8, 32), 32)
    places = batch_sharding(layout(), mesh, (2, 8, 5), 32)
    assert tokens.shard_shape((2, 8, 32)) == (2, 4, 8)
    assert places.shard_shape((2, 8, 5)) == (2, 4, 5)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            config.Train(batch_size=9, micro_batches=2),
            r"train\.batch_size: 9 is not a multiple of train\.micro_batches 2",
        ),
        (
            config.Train(batch_size=12, micro_batches=4),
            r"train\.batch_size: 3 \(per micro-batch\) does not divide over 2",
        ),
        (config.Train(batch_size=8, seq_len=30), r"train\.seq_len: 30 does not divide over 4 devices"),
    ],
)
def test_batches_that_do_not_divide_are_refused(train, message):
    mesh = make_mesh(config.Mesh(data=2, context=4))
    with pytest.raises(ValueError, match=message):
        check_batch(train, layout(), mesh)


# ------------------------------------------------------------------------------------------------------------- einsum


@pytest.mark.parametrize("equation", ["btd,dhc->bthc", "bthc,hcd->btd", "btd,df->btf"])
def test_einsum_is_einsum_with_and_without_a_mesh(equation):
    sizes = dict(b=2, t=4, d=8, h=2, c=4, f=8)
    inputs, _, _ = equation.partition("->")
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal([sizes[a] for a in part]).astype(np.float32) for part in inputs.split(","))
    out = equation.partition("->")[2]
    axes = tuple({"b": "batch", "t": "seq", "h": "heads", "f": "ffn"}.get(a) for a in out)
    expected = np.einsum(equation, x, w)
    np.testing.assert_allclose(layout().einsum(equation, x, w, *axes), expected, rtol=1e-5, atol=1e-5)
    c = config.Mesh(context=2, tensor=2, data=2, axis_type="explicit")
    with on_mesh(make_mesh(c)):
        y = jax.jit(lambda x, w: layout().einsum(equation, x, w, *axes))(x, w)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert y.sharding.spec == layout().spec(axes)


def test_a_weight_with_its_own_einsum_answers_for_itself():
    class Doubled(Leaf):
        def einsum(self, equation, x, shard, *axes):
            return 2 * x

    assert layout().einsum("btd,dd->btd", 3, Doubled()) == 6


def test_gather_casts_and_frees_the_storing_axes():
    a, mesh = layout(), make_mesh(config.Mesh(fsdp=4, tensor=2, axis_type="explicit"))
    with on_mesh(mesh):
        weights = jax.jit(lambda: spec.init(SPECS, jax.random.key(0)), out_shardings=a.shardings(SPECS, mesh))()
        up = jax.jit(lambda w: a.gather(w, SPECS))(weights)["blocks"]["up"]
    assert up.sharding.spec == P(None, None, "tensor") and up.dtype == "bfloat16"


def test_layout_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout().store = {}


@pytest.mark.parametrize(("kinds", "refused"), [(("device",), True), (("device", "pinned_host"), False), ((), False)])
def test_offload_needs_devices_that_reach_the_hosts_memory_or_do_not_say(kinds, refused):
    """Descriptions of GPUs, which programs are compiled for ahead of time, name no memories."""
    memories = [types.SimpleNamespace(kind=k) for k in kinds]
    device = types.SimpleNamespace(platform="gpu", addressable_memories=lambda: memories)
    message = r"execution\.offload: gpu has no pinned host memory, only device"
    with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
        check_host_memory(device)
