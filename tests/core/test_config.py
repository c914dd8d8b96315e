"""The run: typed, frozen, round-trips through JSON, and every slip in it is one line that names the key."""

import dataclasses
import json

import pytest

import jaxlm
from jaxlm.core import config, config_io, registry
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES
from jaxlm.weights.adapters import METHODS


def make_run(model: str = "llama", objective: str = "causal", **changes) -> config.Run:
    return config.Run("x", MODELS[model].Config(), OBJECTIVES[objective].Config(), **changes)


RUN = make_run(
    data=config.Data(train=("a", "b"), weights=(0.5, 2.0)),
    mesh=config.Mesh(fsdp=-1, store=("embed=fsdp+data",)),
    execution=config.Execution(scan=False),
)


def from_json(text: str) -> config.Run:
    return config_io.from_dict(json.loads(text), MODELS, OBJECTIVES, METHODS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_round_trip_through_json(model, objective, tmp_path):
    run = dataclasses.replace(RUN, model=MODELS[model].Config(vocab=99), objective=OBJECTIVES[objective].Config())
    config_io.dump(run, tmp_path / "config.json")
    again = from_json((tmp_path / "config.json").read_text())
    assert again == run
    assert type(again.data.train) is tuple and hash(again) == hash(run)
    assert (registry.name_of(again.model), registry.name_of(again.objective)) == (model, objective)


def test_everything_is_frozen():
    for part in (RUN, RUN.data, RUN.model, RUN.objective, RUN.optim, RUN.train, RUN.mesh, RUN.execution):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("optim", "lrr"), 1, r"unknown config key optim\.lrr; did you mean 'lr'\?"),
        (("trian",), {}, r"unknown config key trian; did you mean 'train'\?"),
        (("model", "widht"), 1, r"unknown config key model\.widht; did you mean 'width'\?"),
        (("model", "family"), "lama", r"model\.family: unknown 'lama'; did you mean 'llama'\?"),
        (("adapter", "family"), "lorra", r"adapter\.family: unknown 'lorra'; did you mean 'lora'\?"),
        (("adapter", "bass"), "nf4", r"unknown config key adapter\.bass; did you mean 'base'\?"),
        (
            ("objective", "family"),
            "zzz",
            rf"^objective\.family: unknown 'zzz'; known: {', '.join(sorted(OBJECTIVES))}; if it is of another package",
        ),
    ],
)
def test_unknown_names_in_json_name_the_nearest(path, value, message):
    values = config_io.to_dict(RUN)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        config_io.from_dict(values, MODELS, OBJECTIVES, METHODS)


@pytest.mark.parametrize("path", [("model",), ("objective",), ("model", "family"), ("name",)])
def test_a_missing_part_is_named(path):
    values = config_io.to_dict(RUN)
    place = values
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ValueError, match=rf"^{path[0]}.*: missing"):
        config_io.from_dict(values, MODELS, OBJECTIVES, METHODS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", "fast"),
        ("train.steps", "10"),
        ("train.steps", 1.5),
        ("train.steps", True),
        ("optim.lr", False),
        ("model.width", None),
        ("data.train", "stdlib"),
        ("data.weights", [1.0, "a"]),
        ("execution.attention", "flash"),
        ("data.document_mask", "yes"),
        ("model", {"family": "llama", "window": "wide"}),
    ],
)
def test_a_wrong_type_in_json_is_named(key, value):
    values = config_io.to_dict(RUN)
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(ValueError, match=r"model\.window" if key == "model" else key.replace(".", r"\.")):
        config_io.from_dict(values, MODELS, OBJECTIVES, METHODS)


def test_a_whole_number_may_stand_for_a_float():
    values = config_io.to_dict(RUN)
    values["optim"]["lr"] = 1
    assert config_io.from_dict(values, MODELS, OBJECTIVES, METHODS).optim.lr == 1


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--optim.lr", "3e-4"], "optim.lr", 3e-4),
        (["--optim.lr=3e-4"], "optim.lr", 3e-4),
        (["--train.batch-size", "8"], "train.batch_size", 8),
        (["--train.batch_size", "8"], "train.batch_size", 8),
        (["--model.width", "24"], "model.width", 24),
        (["--model.tied"], "model.tied", True),
        (["--data.no-document-mask"], "data.document_mask", False),
        (["--objective.z-loss", "1e-4"], "objective.z_loss", 1e-4),
        (["--data.train", "p", "q"], "data.train", ("p", "q")),
        (["--optim.freeze", "embed", "norm"], "optim.freeze", ("embed", "norm")),
        (["--mesh.data", "4"], "mesh.data", 4),
        (["--mesh.tensor", "-1"], "mesh.tensor", -1),
        (["--optim.name", "muon"], "optim.name", "muon"),
        (["--seed", "7"], "seed", 7),
    ],
)
def test_override(args, key, value):
    before, after = config_io.flatten(RUN), config_io.flatten(config_io.override(RUN, args))
    assert after.pop(key) == value
    assert before.pop(key) != value
    assert after == before, "an override changed another field"


def test_no_overrides_is_the_same_run():
    assert config_io.override(RUN, []) is RUN


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.lrr", "1"], r"unknown config key optim\.lrr; did you mean 'optim\.lr'\?"),
        (["--trian.steps=3"], r"unknown config key trian\.steps; did you mean 'train\.steps'\?"),
        (["--optim.lr", "fast"], r"optim\.lr: 'fast' is not a valid float \(now 0\.001\)"),
        (["--train.steps", "1.5"], r"train\.steps: '1\.5' is not a valid int"),
        (["--execution.attention", "flash"], r"execution\.attention: 'flash' is not one of auto, xla"),
        (["--seed", "1", "--train.steps", "many"], r"^train\.steps: 'many'"),
    ],
)
def test_wrong_overrides_are_one_line(args, message):
    with pytest.raises(ValueError, match=message) as error:
        config_io.override(RUN, args)
    assert "\n" not in str(error.value)


def test_load_runs_the_function_of_a_file(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(
        "from jaxlm import Run\nfrom jaxlm.models import bert\nfrom jaxlm.objectives import masked\n"
        "def config():\n    return Run('n', bert.Config(), masked.Config())\n"
    )
    run = config_io.load(file)
    assert (run.name, registry.name_of(run.model)) == ("n", "bert")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"a\.txt: not a Python file"),
        ("a.py", "x = 1", r"a\.py: has no function config\(\)"),
        ("a.py", "config = 3", r"a\.py: has no function config\(\)"),
        ("a.py", "def config(): return 3", r"a\.py: config\(\) returned int, not a Run"),
    ],
)
def test_load_says_what_is_wrong_with_a_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        config_io.load(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"nothing\.py"):
        config_io.load(tmp_path / "nothing.py")


def test_folder_is_out_and_name():
    assert str(dataclasses.replace(RUN, name="b", out="a").folder) == "a/b"


OVERRIDES = """
# nested and with dots, as one likes
optim:
  lr: 1e-3
  name: muon
train.steps: 7
train: {prompts: [no, "1"], nonfinite: skip}
adapter: lora
adapter.rank: 4
"""


def test_a_file_of_overrides_is_read_by_the_rules_of_yaml_1_2(tmp_path):
    (file := tmp_path / "run.yaml").write_text(OVERRIDES)
    run = jaxlm.load(lambda: RUN, overrides=file, seed=3, **{"adapter.alpha": 2.0})
    assert (run.optim.lr, run.optim.name, run.train.steps, run.seed) == (1e-3, "muon", 7, 3)
    assert run.train.prompts == ("no", "1") and run.train.nonfinite == "skip"
    assert (run.adapter.rank, run.adapter.alpha) == (4, 2.0)


def test_a_stored_config_is_a_file_of_overrides(tmp_path):
    changed = jaxlm.load(lambda: RUN, seed=3, adapter="lora", **{"optim.lr": 0.5, "adapter.rank": 2})
    config_io.dump(changed, tmp_path / "config.json")
    assert jaxlm.load(lambda: RUN, overrides=tmp_path / "config.json") == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"^overrides: no file .*run\.yaml$"),
        ("optim: [", r"^overrides: .*run\.yaml: .*line 1"),
        ("- 3", r"^overrides: .*: it must hold fields and their values"),
        ("optim.lr: 1\noptim.lr: 2", r"^overrides: .*: optim\.lr stands twice$"),
        ("optim.lr: fast", r"^optim\.lr: 'fast' is not a valid float"),
        ("optim.lrr: 1", r"^unknown config key optim\.lrr; did you mean 'lr'\?"),
        ("train.steps: yes", r"^train\.steps: 'yes' is not a valid int"),
        ("model: {family: gpt2}", r"^model\.family: 'gpt2', but the run's is 'llama'; choose another config$"),
        ("data: !!python/object/apply:os.getcwd []", r"^overrides: .*: could not determine a constructor"),
        ("adapter: lorra", r"^adapter: unknown 'lorra'"),
    ],
)
def test_a_wrong_file_of_overrides_is_one_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        jaxlm.load(lambda: RUN, overrides=tmp_path / "run.yaml")
    assert "\n" not in str(error.value)
