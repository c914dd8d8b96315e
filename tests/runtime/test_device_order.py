"""Machines that a slow network joins: outer axes cross it, and inner ones stay within a machine."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.core import config
from jaxlm.runtime import device_order
from jaxlm.runtime.mesh import AXES, make_mesh


def devices(*of: int, platform: str = "gpu", name: str = "partition_index") -> list[SimpleNamespace]:
    """One a slice number, in an order that tells nothing: every second one first."""
    every = [
        SimpleNamespace(id=i, platform=platform, device_kind="x", process_index=i // 2, **({name: s} if name else {}))
        for i, s in enumerate(of)
    ]
    return every[1::2] + every[::2]


def sizes(**of: int) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | of


@pytest.mark.parametrize(
    ("of", "n", "crossing"),
    [
        (dict(data=4, tensor=2), 2, dict(data=2)),
        (dict(replica=2, data=2, fsdp=2), 4, dict(replica=2, data=2)),
        (dict(replica=2, fsdp=8), 8, dict(replica=2, fsdp=4)),
        (dict(stage=2, fsdp=2, context=2, tensor=4), 2, dict(stage=2)),
        (dict(context=4, expert=2, tensor=2), 8, dict(context=4, expert=2)),
        (dict(data=6, fsdp=2), 4, dict(data=2, fsdp=2)),
    ],
)
def test_outer_axes_cross_first(of, n, crossing):
    assert device_order.ways_across_slices(sizes(**of), n) == sizes(**crossing)


def test_what_would_put_tensor_parallelism_across_is_refused():
    with pytest.raises(ValueError, match=r"mesh: 4 slices .* of mesh\.data 2, mesh\.tensor 4; make .* multiple of 4"):
        device_order.ways_across_slices(sizes(data=2, tensor=4), 4)
    with pytest.raises(ValueError, match=r"mesh: 3 slices"):
        device_order.arrange(devices(0, 0, 1, 1, 2, 2), sizes(data=2, tensor=3))


@pytest.mark.parametrize(("platform", "name"), [("gpu", "partition_index"), ("tpu", "slice_index"), ("gpu", "")])
def test_inner_axes_stay_within_a_slice(platform, name):
    """Without a word from the runtime a GPU's slice is its process."""
    if platform == "tpu":  # whose own order within a slice is the library's: it asks for coordinates
        of = devices(0, 0, 1, 1, 2, 2, 3, 3, platform="other", name=name)
    else:
        of = devices(0, 0, 1, 1, 2, 2, 3, 3, platform=platform, name=name)
    mesh = device_order.arrange(of, sizes(replica=2, fsdp=2, tensor=2))
    assert mesh.shape == (2, 1, 1, 2, 1, 1, 2)
    at = np.vectorize(device_order.slice_of)(mesh).reshape(2, 2, 2)
    np.testing.assert_array_equal(at, np.arange(4).reshape(2, 2)[..., None].repeat(2, -1))
    assert len({d.id for d in mesh.flat}) == 8


def test_an_axis_may_lie_within_slices_and_across_them():
    mesh = device_order.arrange(devices(0, 0, 0, 0, 1, 1, 1, 1), sizes(fsdp=8))
    assert [device_order.slice_of(d) for d in mesh.flat] == [0] * 4 + [1] * 4


def test_one_slice_and_unequal_ones():
    assert device_order.arrange(devices(3, 3), sizes(data=2)).size == 2
    assert device_order.arrange(devices(0, 1, 2, 3, platform="cpu", name=""), sizes(data=4)).size == 4
    with pytest.raises(ValueError, match=r"mesh: slices must be equal, and there are 1 in slice 0, 3 in slice 1"):
        device_order.arrange(devices(0, 1, 1, 1), sizes(data=4))


@pytest.mark.parametrize(
    "of", [dict(fsdp=64), dict(fsdp=16, tensor=4), dict(fsdp=8, expert=8), dict(fsdp=32, tensor=2)]
)
def test_dimensions_of_a_tpu_slice_are_split_among_axes_where_they_must(of):
    cube = [SimpleNamespace(id=i, platform="tpu", device_kind="TPU v5", process_index=i // 4, slice_index=0,
                            coords=[i % 4, i // 4 % 4, i // 16], core_on_chip=0) for i in range(64)]  # fmt: skip
    mesh = device_order.arrange(cube, sizes(**of))
    assert mesh.shape == tuple(sizes(**of).values()) and {d.id for d in mesh.flat} == set(range(64))


def test_the_mesh_is_made_of_slices(monkeypatch):
    """Of real devices that a test says lie in two slices, every second one in each."""
    monkeypatch.setattr(device_order, "slice_of", lambda d: d.id % 2)
    mesh = make_mesh(config.Mesh(data=2, tensor=4))
    assert [[d.id for d in row] for row in mesh.devices.reshape(2, 4)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(ValueError, match=r"mesh: 2 slices .* mesh\.tensor 8"):
        make_mesh(config.Mesh(tensor=8))
