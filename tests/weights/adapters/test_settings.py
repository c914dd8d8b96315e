"""Settings of adapters: each method has its own fields and no others, by file, command line and in old runs."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxlm.assembly import run_directory
from jaxlm.commands import cli
from jaxlm.core import config, config_io
from jaxlm.models import MODELS, llama
from jaxlm.objectives import OBJECTIVES, causal
from jaxlm.planning import mesh_search
from jaxlm.weights import adapters
from jaxlm.weights.adapters import METHODS
from jaxlm.weights.adapters.old_settings import upgraded

RUN = config.Run("r", llama.Config(), causal.Config())
FIELDS = {name: {f.name for f in dataclasses.fields(m.Config)} for name, m in METHODS.items()}
EVERY = sorted(set().union(*FIELDS.values()))


def read(values: dict) -> config.Run:
    return config_io.from_dict(json.loads(json.dumps(values)), MODELS, OBJECTIVES, METHODS)


def overridden(run: config.Run, *args: str) -> config.Run:
    return config_io.override(*config_io.choose_adapter(run, list(args), METHODS))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_refuses_the_fields_of_others(name):
    run = dataclasses.replace(RUN, adapter=METHODS[name].Config())
    others = [field for field in EVERY if field not in FIELDS[name]]
    assert others and "base" not in others
    for field in others:
        with pytest.raises(TypeError, match=field):
            METHODS[name].Config(**{field: 1})
        with pytest.raises(ValueError, match=rf"^unknown config key adapter\.{field}; ") as error:
            overridden(run, f"--adapter.{field}", "1")
        suggested = str(error.value).partition("did you mean 'adapter.")[2].partition("'")[0]
        assert name == "none" or not suggested or suggested in FIELDS[name]
        values = config_io.to_dict(run)
        values["adapter"][field] = 1
        with pytest.raises(ValueError, match=rf"^unknown config key adapter\.{field}; "):
            read(values)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_an_adapter_is_written_and_read(name, tmp_path):
    run = dataclasses.replace(RUN, adapter=METHODS[name].Config(base="bfloat16"))
    values = config_io.to_dict(run)
    assert values["adapter"]["family"] == name and values["adapter"].keys() == {"family", *FIELDS[name]}
    assert read(values) == run and hash(read(values)) == hash(run)
    mesh_search.write(run, tmp_path / "c.py", "why")
    assert config_io.load(tmp_path / "c.py") == run


def test_methods_of_equal_fields_are_told_apart(tmp_path):
    """A run directory of one method is not continued as another's."""
    run = dataclasses.replace(RUN, adapter=adapters.Houlsby(), out=str(tmp_path))
    other = dataclasses.replace(run, adapter=adapters.Pfeiffer())
    assert run.adapter != other.adapter
    assert not run_directory.claim(run)
    run.folder.mkdir()
    config_io.dump(run, run.folder / "config.json")
    assert run_directory.claim(run)
    with pytest.raises(ValueError, match="adapter is 'houlsby' there and 'pfeiffer' here"):
        run_directory.claim(other)


def test_the_command_line_chooses_a_method_and_its_fields():
    chosen = overridden(RUN, "--seed", "3", "--adapter", "lora", "--adapter.rank", "16", "--adapter.rank-stabilized")
    assert chosen == dataclasses.replace(RUN, seed=3, adapter=adapters.Lora(rank=16, rank_stabilized=True))
    assert overridden(RUN, "--adapter.tokens", "3", "--adapter=prompt").adapter == adapters.Prompt(tokens=3)
    assert overridden(chosen, "--adapter", "none").adapter == config.Adapter()
    assert overridden(chosen, "--adapter", "lora") == chosen
    mine = dataclasses.replace(RUN, adapter=adapters.Lora(rank=3, targets=("all",), base="nf4", dropout=0.5))
    expected = adapters.Vera(rank=3, targets=("all",), base="nf4", dropout=0.5)
    assert overridden(mine, "--adapter", "vera").adapter == expected, "what both have is kept"


@pytest.mark.parametrize(("args", "message"), [
    (("--adapter", "lorra"), r"^adapter: unknown 'lorra'; did you mean 'lora'\?$"),
    (("--adapter",), r"^adapter: unknown ''; known: adalora, "),
    (("--adapter", "lora", "--adapter.rnak", "3"), r"^unknown config key adapter\.rnak; .* 'adapter\.rank'\?$"),
    (("--adapter", "prefix", "--adapter.token", "3"), r"did you mean 'adapter\.tokens'\?$"),
    (("--adapter", "lora", "--adapter.rank", "many"), r"^adapter\.rank: 'many' is not a valid int \(now 8\)$"),
    (("--adapter.rank", "3"), r"^unknown config key adapter\.rank; choose a method first, .*: --adapter lora"),
    (("--adapter.method", "lora"), r"^unknown config key adapter\.method; choose a method first, .*: --adapter lora"),
])  # fmt: skip
def test_a_slip_is_one_line(args, message):
    with pytest.raises(ValueError, match=message) as error:
        overridden(RUN, *args)
    assert "\n" not in str(error.value)


def test_help_shows_the_fields_of_the_chosen_method(capsys):
    assert cli.main(["train", "tiny_llama", "--adapter", "lora", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--adapter.{field.replace('_', '-')}" in shown for field in FIELDS["lora"])
    assert "--adapter.tokens" not in shown


# What runs stored when one class of fields served all methods.
OLD = {
    "method": "", "base": "float32", "targets": [], "rank": 8, "alpha": 16.0, "rank_stabilized": False, "dropout": 0.0,
    "b_lr": 1.0, "target_rank": 8, "warmup": 0.1, "settle": 0.2, "orthogonal": 0.5, "reduction": 16.0, "tokens": 20,
    "text": "", "hidden": 0,
}  # fmt: skip


@pytest.mark.parametrize(("stored", "expected"), [
    ({}, config.Adapter()),
    (dict(method="lora", base="nf4", targets=["all"], rank=64, alpha=16, dropout=0.1, b_lr=16.0),
     adapters.Lora(base="nf4", targets=("all",), rank=64, alpha=16, dropout=0.1, b_lr=16.0)),
    (dict(method="dora", rank=4, rank_stabilized=True), adapters.Dora(rank=4, rank_stabilized=True)),
    (dict(method="pissa", rank=2, alpha=3.0), adapters.Pissa(rank=2, alpha=3.0)),
    (dict(method="adalora", rank=12, target_rank=4, warmup=0.3, settle=0.4, orthogonal=0.1),
     adapters.AdaLora(rank=12, target_rank=4, warmup=0.3, final_tuning=0.4, orthogonal=0.1)),
    (dict(method="vera", rank=256), adapters.Vera(rank=256)),
    (dict(method="ia3", rank=3), adapters.Ia3()),
    (dict(method="parallel", reduction=2.0), adapters.Parallel(reduction=2.0)),
    (dict(method="prefix", tokens=3), adapters.Prefix(tokens=3)),
    (dict(method="prompt", tokens=3, text="be brief"), adapters.Prompt(tokens=3, text="be brief")),
    (dict(method="p_tuning", tokens=3, hidden=7), adapters.PTuning(tokens=3, hidden=7)),
    (dict(method="bitfit", base="int8"), adapters.BitFit(base="int8")),
])  # fmt: skip
def test_a_run_directory_of_before_opens_with_the_same_meaning(stored, expected, tmp_path):
    values = config_io.to_dict(RUN) | {"adapter": OLD | stored}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert run_directory.read_config(tmp_path) == dataclasses.replace(RUN, adapter=expected)


def test_a_run_directory_from_before_there_were_adapters_opens(tmp_path):
    values = config_io.to_dict(RUN)
    del values["adapter"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert run_directory.read_config(tmp_path) == RUN


@pytest.mark.parametrize(("stored", "message"), [
    (dict(method="lorra"), r"adapter\.family: unknown 'lorra'; did you mean 'lora'\?"),
    (dict(method="lora", ranc=3), r"unknown config key adapter\.ranc; did you mean 'rank'\?"),
    (dict(method="lora", rank="3"), r"adapter\.rank: '3' is not a valid int"),
])  # fmt: skip
def test_what_is_wrong_with_an_old_adapter_is_named(stored, message):
    with pytest.raises(ValueError, match=message):
        read(upgraded(config_io.to_dict(RUN) | {"adapter": OLD | stored}))


BROKEN = """
from typing import Any

from jaxlm.weights.adapters.lora import Lora
from jaxlm.weights.adapters.low_rank import LowRank, bind
from jaxlm.weights.adapters.method import Method, Weights
from jaxlm.weights.matrices import Matrix


def without_key(c: Lora, target: Matrix, base: Any, adapter: Weights, shared: Weights) -> LowRank:
    return bind(c, target, base, adapter, shared, None)


Method[Lora](Config=Lora, bind=bind)
Method[Lora](Config=Lora, bind=without_key)
"""


@pytest.mark.slow
def test_types_refuse_a_method_whose_bind_has_another_signature(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    root = Path(cli.__file__).parents[2]
    monkeypatch.chdir(root)
    (tmp_path / "broken.py").write_text(BROKEN)
    cache = root / ".mypy_cache" if (root / ".mypy_cache").is_dir() else tmp_path / "cache"
    out, errors, _ = api.run([f"--cache-dir={cache}", "--config-file=pyproject.toml", str(tmp_path / "broken.py")])
    assert not errors and out.count("error:") == 1, out
    line = BROKEN.rstrip().count("\n") + 1
    assert f'broken.py:{line}: error: Argument "bind" to "Method" has incompatible type' in out
