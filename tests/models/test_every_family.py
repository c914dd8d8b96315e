"""What holds for every architecture: packed = alone, cached = at once, scanned = unrolled, any mesh = one device."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from support.hf_rows import ROWS

from jaxlm.core import config, spec, tree
from jaxlm.models import MODELS
from jaxlm.testing import FamilyLaws

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
# The variants that have most to get wrong; of the other architectures, the first.
TELLING = ("llama_3.1", "mistral_wide_tied", "smollm3_window", "qwen2_window", "qwen3_window", "gemma2", "gemma3")


@functools.cache
def published(name: str) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as golden:
        return json.loads(str(golden["config"]))


def cases() -> list[str]:
    """One row for each `model_type`."""
    chosen: dict[str, str] = {}
    for name in ROWS:
        kind = published(name)["model_type"]
        if kind not in chosen or name in TELLING:
            chosen[kind] = name
    return list(chosen.values())


def family_of(kind: str):
    return next(f for f in MODELS.values() if kind in f.MODEL_TYPES)


def by_default(usual: tuple[str, ...], names: list[str]) -> list:
    """All names, of which those not `usual` are slow tests."""
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


CASES = cases()
# By default one architecture of each family, and of those that run their layers in every way, the two whose layers are
# of several kinds: the others do that in `training/test_meshes.py`.
USUAL = (
    "gpt2",
    "qwen3_window",
    "gemma2",
    "olmo2",
    "bert",
    "modernbert",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "t5",
    "bart",
)
EACH = by_default(("gemma2", "modernbert"), CASES)
GENERATING = [name for name in CASES if ROWS[name].inputs not in ("encoder", "types")]


def test_every_family_is_tested_by_default():
    assert sorted(family_of(published(name)["model_type"]).__name__ for name in USUAL) == sorted(
        f.__name__ for f in MODELS.values()
    )


# Layers of a model by default here, where published ones have more: one of each kind.
FEW = dict(qwen3_window=2, gemma2=2, gpt_oss=2, deepseek_v3=2)
# And where they run in every way: two kinds in turn, twice, which are a loop over pairs.
IN_TURN = dict(gemma2=4)


@functools.cache
def laws(name: str, layers: int | None) -> FamilyLaws:
    """The laws of a published architecture, with so many layers; tests of one model share its programs."""
    values = published(name)
    family = family_of(values["model_type"])
    c = family.from_hf(values)
    return FamilyLaws(family, dataclasses.replace(c, layers=layers) if layers else c)


@pytest.mark.parametrize("name", by_default(USUAL, CASES))
def test_packed_equals_alone(name):
    laws(name, FEW.get(name)).check_settings()
    laws(name, FEW.get(name)).check_packed()


@pytest.mark.parametrize("name", by_default(USUAL, GENERATING))
def test_with_a_cache_equals_at_once_and_no_position_sees_the_next(name):
    laws(name, FEW.get(name)).check_cache()
    laws(name, FEW.get(name)).check_cache_of_rows()
    laws(name, FEW.get(name)).check_causality()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_scanned_and_rematerialized_equals_unrolled(name):
    """On one device; the test below finds what this one does, and this one says whether the mesh is to blame."""
    laws(name, IN_TURN.get(name)).check_scanned()


@pytest.mark.parametrize("name", EACH)
def test_a_mesh_equals_one_device(name):
    """Scanned and rematerialized on explicit axes, where a missing annotation is an error; unrolled on the device."""
    model = laws(name, IN_TURN.get(name))
    moe = "experts" in {a for s in tree.flatten(model.specs, spec.is_spec).values() for a in s.axes}
    model.check_mesh(config.Mesh(data=1 if moe else 2, fsdp=2, expert=2 if moe else 1, tensor=2, axis_type="explicit"))
