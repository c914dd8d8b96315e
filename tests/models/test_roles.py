"""The roles that weights state: they decide what decays, what Muon and adapters take, and what rests in few bits."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.hf_rows import ROWS

from jaxlm.core import config, spec, tree
from jaxlm.models import MODELS
from jaxlm.training import optimizers, rate_scales
from jaxlm.weights.adapters import METHODS, adapted
from jaxlm.weights.matrices import matrices as matrices_of
from jaxlm.weights.matrices import select

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
DEFAULTS = {f"{name} by default": name for name in MODELS}
CASES = [*ROWS, *DEFAULTS]


def specs_of(name: str):
    """(family, config, flat specs) of a published row, or of a family's defaults with every bias it may have."""
    if name in ROWS:
        with np.load(GOLDEN / f"{name}.npz") as golden:
            values = json.loads(str(golden["config"]))
        family = next(f for f in MODELS.values() if values["model_type"] in f.MODEL_TYPES)
        c = family.from_hf(values)
    else:
        family = MODELS[DEFAULTS[name]]
        switches = [f.name for f in dataclasses.fields(family.Config) if f.name.endswith("bias")]
        c = dataclasses.replace(family.Config(), **dict.fromkeys(switches, True))
    return family, c, tree.flatten(family.specs(c), spec.is_spec)


def role_by_name(path: str) -> str:
    """The role that the last part of a weight's path tells."""
    last = path.rpartition("/")[2]
    if last in ("selection_bias", "router", "head"):
        return last
    if last.endswith("bias"):
        return "norm_bias" if "norm" in last else "bias"
    if last in ("k_b", "v_b"):
        return "absorbed"
    if last in ("embed", "position", "type"):
        return "table"
    return "norm" if "norm" in last else "matrix"


@pytest.mark.parametrize("name", CASES)
def test_roles_agree_with_names(name):
    _, _, flat = specs_of(name)
    assert {path: s.role for path, s in flat.items()} == {path: role_by_name(path) for path in flat}


@pytest.mark.parametrize("name", CASES)
def test_what_is_decided_by_roles_is_what_names_would_decide(name):
    """By names as they would be read if weights stated no role."""
    family, c, flat = specs_of(name)
    matrices = {
        p for p, s in flat.items() if len(s.shape) - ("layers" in s.axes) >= 2 and role_by_name(p) not in spec.VECTORS
    }
    hidden = {p for p in matrices if "layers" in flat[p].axes}
    balanced = {p for p in flat if p.endswith("selection_bias")}
    groups = optimizers.make(config.Optim(name="muon", warmup=1), 10, family.specs(c)).groups
    assert {p for p, g in groups.items() if not g.endswith("no decay")} == matrices
    assert {p for p, g in groups.items() if g.startswith("muon")} == hidden
    assert {p for p, g in groups.items() if g.startswith("balance")} == balanced

    lowest = {"bert": "norm|norm_bias|relative", "bart": ".*/norm_embed.*", "t5": ".*/bias"}
    lowest = lowest.get(family.__name__.rpartition(".")[2], "-")
    found = {p for p in flat if re.fullmatch(rf"(.*/)?(embed|position|type)(_.*)?|{lowest}", p)}
    below = {p for p in found if "layers" not in flat[p].axes}
    scales = tree.flatten(rate_scales.depth_scales(config.Optim(layer_decay=0.5), family.specs(c)))
    deepest = max(s.shape[0] + s.layers_above for s in flat.values() if s.axes[0] == "layers")
    assert deepest == max(c.layers, getattr(c, "decoder_layers", 0) or 0)
    assert {p for p, x in scales.items() if np.min(x) == 0.5 ** (deepest + 1)} == below

    names = family.names(c)
    layered = {p for p, s in flat.items() if s.axes[0] == "layers" and names[p].ins is not None}
    assert set(matrices_of(family, c)) == {p for p in layered if "router" not in flat[p].axes}
    targets = {p for p in layered if "experts" not in flat[p].axes and "router" not in flat[p].axes}
    found = select(matrices_of(family, c), ("all",))
    assert set(found) == {p for p in targets if not p.endswith(("/k_b", "/v_b"))}
    for method, part in {"bitfit": "bias", "norms": "norm"}.items():
        adapter = adapted.Adapted(METHODS[method].Config(), family, c)
        assert {p for p in flat if adapter.trainable(p)} == {p for p in flat if part in p.rpartition("/")[2]}


@pytest.mark.parametrize("method", ["dora", "ia3", "vera", "adalora", "prefix"])
def test_what_adapters_multiply_with_is_neither_decayed_nor_made_orthogonal(method):
    """Though factors of heads, like OLMo's norms, have two dimensions. Keys and values of a prefix are rows of a
    table."""
    family, c = MODELS["llama"], MODELS["llama"].Config(vocab=8, layers=2, width=8, heads=2, kv_heads=2, ffn=8)
    adapter = adapted.Adapted(METHODS[method].Config(), family, c)
    specs = adapter.specs()["adapter"]
    groups = optimizers.make(
        config.Optim(name="muon", warmup=1), 10, specs, trainable=lambda p: "shared" not in p
    ).groups
    factors = {p: g for p, g in groups.items() if p.rpartition("/")[2] in ("m", "by", "g", "e")}
    assert bool(factors) == (method != "prefix") and set(factors.values()) <= {"adamw, no decay"}
    rows = {g for p, g in groups.items() if p.rpartition("/")[2] in ("keys", "values")}
    assert rows == ({"adamw, decay 0.1"} if method == "prefix" else set())
    others = {g for p, g in groups.items() if p.rpartition("/")[2] in ("a", "b")}
    assert others <= {"muon, decay 0.1", "frozen"} and (method in ("ia3", "prefix") or others)


def test_stacking_keeps_the_role():
    layer = dict(norm=spec.norm(4), bias=spec.bias((2, 3), "heads", None), w=spec.Spec((4, 4), (None, None), spec.ones))
    assert {n: s.role for n, s in spec.stacked(3, layer).items()} == dict(norm="norm", bias="bias", w="matrix")
