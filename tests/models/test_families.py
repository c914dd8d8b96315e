"""Every row of MODELS is a family in full, and mypy says so of one that isn't."""

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import jax.numpy as jnp
import pytest

import jaxlm
from jaxlm.core import spec, tree
from jaxlm.models import MODELS
from jaxlm.nn.family import Family, Files, ModelConfig, Published

ROOT = Path(jaxlm.__file__).parents[1]
MEMBERS = {name: value for c in (Published, Family) for name, value in vars(c).items() if not name.startswith("_")}
FUNCTIONS = [name for name, value in MEMBERS.items() if inspect.isfunction(value)]


def same_signature(protocol, function) -> bool:
    """Whether a function takes what the protocol's method does after `self`; positional arguments may have any name."""
    due = list(inspect.signature(protocol).parameters.values())[1:]
    found = list(inspect.signature(function).parameters.values())
    alike = [
        a.default == b.default
        and (a.kind == b.kind == a.KEYWORD_ONLY or b.kind == b.POSITIONAL_OR_KEYWORD)
        and (a.kind == a.POSITIONAL_ONLY or a.name == b.name)
        for a, b in zip(due, found, strict=False)
    ]
    return len(due) == len(found) and all(alike)


@pytest.mark.parametrize("name", MODELS)
def test_every_row_satisfies_the_protocol(name):
    family = MODELS[name]
    for member in MEMBERS:
        assert hasattr(family, member), member
    for function in FUNCTIONS:
        assert same_signature(MEMBERS[function], getattr(family, function)), function
    assert isinstance(family.FILES, Files) and isinstance(family.MODEL_TYPES, tuple)
    assert family.kind in ("decoder", "encoder", "encoder_decoder") and isinstance(family.generates, bool)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_answers_what_its_family_does_not_have(name):
    c = MODELS[name].Config()
    assert isinstance(c, ModelConfig) and dataclasses.is_dataclass(c)
    for neutral, kind in typing.get_type_hints(ModelConfig).items():
        value = getattr(c, neutral)
        if kind in (bool, int, str):
            assert isinstance(value, kind), (neutral, value)
    fields = {f.name for f in dataclasses.fields(c)}
    if "moe" not in fields:
        assert c.moe is None
    if "head" not in fields:
        assert c.head
    flat = tree.flatten(MODELS[name].specs(c), spec.is_spec)
    assert c.tied == (not any(s.role == "head" for s in flat.values()))


@pytest.mark.parametrize("name", [name for name, family in MODELS.items() if not family.generates])
def test_what_does_not_generate_refuses_a_cache(name):
    with pytest.raises(ValueError, match="has no cache"):
        MODELS[name].init_cache(MODELS[name].Config(), 1, 8, jnp.float32)


def test_a_wrong_signature_is_told_from_a_right_one():
    family = MODELS["olmo"]
    assert not same_signature(Family.forward, lambda c, specs, params, batch, *, shard, key=None: None)
    assert not same_signature(Family.forward, lambda c, specs, params, batch, *, layout, key=None, cache=None: None)
    assert not same_signature(Published.names, family.forward)


BREAKS = {
    "forward": ("key: Key = None, cache: Cache | None = None", "key: Key = None"),
    "kind": ('kind: Kind = "decoder"', 'kind = "decoders"'),
    "FILES": ("FILES = decoder.FILES", ""),
    "Config": ("class Config(decoder.DecoderConfig)", "class Config"),
    "names": ("def names(c: Config)", "def names(c: Config, files: int)"),
}


@pytest.mark.slow  # mypy reads all that a family imports
def test_mypy_reports_a_family_that_breaks_the_protocol(tmp_path):
    """Of five copies of one family that each break a member, and one that breaks none."""
    source = (ROOT / "jaxlm/models/olmo.py").read_text()
    lines = ["from jaxlm.nn.family import Family", "import whole", "rows: dict[str, Family] = {'whole': whole}"]
    (tmp_path / "whole.py").write_text(source)
    for name, (old, new) in BREAKS.items():
        assert source.count(old) == 1, name
        (tmp_path / f"broken_{name}.py").write_text(source.replace(old, new))
        lines += [f"import broken_{name}", f"one_{name}: Family = broken_{name}"]
    (tmp_path / "table.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "table.py"]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache")],
        cwd=tmp_path, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    wrong = [line for line in done.stdout.splitlines() if line.startswith("table.py") and "error:" in line]
    assert len(wrong) == len(BREAKS) and "whole" not in "".join(wrong), done.stdout + done.stderr
    for name in BREAKS:
        assert any(name in line for line in done.stdout.splitlines() if line.startswith("table.py")), name
