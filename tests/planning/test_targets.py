"""Machines by name; names that mean none say which do."""

import importlib.util
import os
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from jaxlm.core import config
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, targets
from jaxlm.runtime import chips


@pytest.mark.parametrize(("name", "chip", "shape", "slices", "count", "near"), [
    ("v5p:4x4x4", "v5p", (4, 4, 4), 1, 64, 64),
    ("v5p-128", "v5p", (4, 4, 4), 1, 64, 64),  # counts cores
    ("v5p-768", "v5p", (4, 8, 12), 1, 384, 384),
    ("v6e:16x16", "v6e", (16, 16), 1, 256, 256),
    ("v5litepod-16", "v5e", (4, 4), 1, 16, 16),
    ("2*v5e:16x16", "v5e", (16, 16), 2, 512, 256),
    ("tpu7x-16", "tpu7x", (2, 2, 2), 1, 16, 16),
    ("h100:8", "h100", (1, 8), 1, 8, 8),
    ("h100:8x8", "h100", (8, 8), 1, 64, 8),
    ("cpu:8", "cpu", (8,), 1, 8, 8),
])  # fmt: skip
def test_names(name, chip, shape, slices, count, near) -> None:
    t = targets.parse(name)
    assert (t.chip.name, t.shape, t.slices, t.count, t.near) == (chip, shape, slices, count, near)


@pytest.mark.parametrize(("name", "said"), [
    ("v6e:3x5", r"doesn't exist; nearest: v6e:4x4, v6e:2x4"),
    ("v5p:3x3x3", r"nearest: v5p:2x4x4"),
    ("v5p-130", r"nearest: v5p-64, v5p-128"),
    ("v6e", r"doesn't exist; nearest: v6e:1x1"),
    ("h100:16", r"nearest: h100:2x8"),
    ("v9:2x2", r"no chip 'v9'; did you mean 'v4'"),
    ("cpu:2x2", r"nearest: cpu:8"),
    ("two h100", r"is no machine; examples: v5p:4x4x4"),
])  # fmt: skip
def test_what_does_not_exist(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        targets.parse(name)


@pytest.mark.parametrize(("name", "command"), [("v5e:2x2", r"jax\[tpu\]"), ("h100:8", r"jax\[cuda13\]")])
def test_a_missing_compiler_says_what_installs_it(name, command, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=rf'compiler for {name} is missing: pip install "{command}"'):
        targets.parse(name).devices()


SKIP = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


@pytest.mark.parametrize(("name", "driver", "mine", "within"), [
    ("h100:8", False, None, "1"),
    ("h100:8", False, "", ""),  # what the user set stays
    ("h100:8", True, None, None),
    ("v5p:4x4x4", False, None, None),
    ("cpu:8", False, None, None),
])  # fmt: skip
def test_a_gpu_that_is_not_here_needs_no_driver(name, driver, mine, within, monkeypatch) -> None:
    monkeypatch.setattr(targets, "has_nvidia_driver", lambda: driver)
    monkeypatch.delenv(SKIP, raising=False)
    if mine is not None:
        monkeypatch.setenv(SKIP, mine)
    with pytest.raises(KeyError), targets.without_driver(targets.parse(name)):
        assert os.environ.get(SKIP) == within
        raise KeyError
    assert os.environ.get(SKIP) == mine


def test_the_plug_in_starts_without_a_driver_wherever_a_plan_first_needs_it(monkeypatch) -> None:
    seen = []

    def note(*args, **kwargs):
        seen.append(os.environ.get(SKIP))
        return SimpleNamespace(devices=["gpu"])

    monkeypatch.setattr(targets, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(targets, "require", lambda *args: None)
    monkeypatch.setattr(topologies, "get_topology_desc", note)
    monkeypatch.setattr(ahead_of_time.programs, "program", note)
    monkeypatch.delenv(SKIP, raising=False)
    gpu = targets.parse("h100:1")
    assert gpu.devices() == ["gpu"]
    shape = llama.Config(vocab=384, layers=1, width=16, heads=2, kv_heads=2, head_width=8, ffn=32)
    ahead_of_time.program_for(config.Run("r", shape, causal.Config()), gpu)
    assert seen == ["1", "1"] and SKIP not in os.environ


def test_this_machine_and_its_cpus() -> None:
    assert targets.parse("here").devices() == jax.devices()
    assert targets.here().count == 8
    assert len(targets.parse("cpu:8").devices()) == 8
    with pytest.raises(ValueError, match="cpu:64 is more than the 8 devices"):
        targets.parse("cpu:64").devices()


def test_every_chip_is_in_the_table_of_peaks() -> None:
    for chip in chips.CHIPS.values():
        assert chip.flops and chip.hbm and chip.link and chip.network, chip.name
        assert chips.of_kind(chip.kind) is chip
        assert (chip.platform == "gpu") == bool(chip.xla)
    assert chips.of_kind("TPU v5p") is chips.CHIPS["v5p"]


def test_what_xla_is_told_of_a_gpu() -> None:
    text = chips.xla_target(chips.CHIPS["h100"])
    assert "core_count: 132 " in text and "{ major: 9 minor: 0 }" in text and "{{" not in text
    assert 'device_description_str: "NVIDIA H100 80GB HBM3"' in text


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:2x4x4", (False, False, False)),
        ("v5p:4x4x4", (True, True, True)),
        ("v4:4x4x8", (True, True, True)),
        ("v6e:8x8", (False, False, False)),
        ("v6e:8x16", (False, True, False)),
        ("v5e:16x16", (True, True, False)),
        ("h100:8x8", (False, False, False)),
    ],
)
def test_which_slices_are_rings(name, wraps):
    assert targets.parse(name).wraps == wraps
