"""Run directories that version 0.1.0 wrote before its modules moved into rooms still open, evaluate and continue.

`golden/run_directories.tar.gz` holds two of them, trained for two steps on the text beside them: one of all weights and
one of a LoRA adapter that starts from the first. The losses are those that the old code printed.
"""

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest

from jaxlm.assembly import run_directory
from jaxlm.commands import cli
from jaxlm.core import config, config_io

ARCHIVE = Path(__file__).parents[1] / "golden" / "run_directories.tar.gz"
LOSSES = {"causal": 6.08639004838781, "lora": 6.07885609959577}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # the runs name their text relative to it
    return tmp_path


@pytest.mark.parametrize("name", LOSSES)
def test_an_old_run_evaluates_to_the_same_loss(runs, name, capsys):
    assert cli.main(["eval", name, "--data", "text.jsonl", "--resamples", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == pytest.approx(LOSSES[name], abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_an_old_run_continues_from_its_checkpoint(runs, name, capsys):
    """The end of its log is cut off, so that weights and the optimizer's state are restored."""
    log = runs / name / "metrics.jsonl"
    lines = log.read_text().splitlines()
    assert json.loads(lines[-1])["name"] == "end"
    log.write_text("\n".join(lines[:-1]) + "\n")
    assert cli.main(["train", name]) == 0
    assert f"continuing {name} after step 2" in capsys.readouterr().out
    assert json.loads(log.read_text().splitlines()[-1])["name"] == "end"


def test_fields_that_were_renamed_are_read_by_their_former_names(tmp_path):
    run = config_io.load(config_io.find("tiny_llama"))
    run = dataclasses.replace(run, execution=config.Execution(matmul="fp8", matmul_skip_first=1, matmul_skip_last=2))
    values = config_io.to_dict(run)
    for end in ("first", "last"):
        values["execution"][f"fp8_skip_{end}"] = values["execution"].pop(f"matmul_skip_{end}")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert run_directory.read_config(tmp_path) == run
    with pytest.raises(ValueError, match=r"key execution\.fp8_skip_last; did you mean .*matmul_skip_last"):
        config_io.override(run, ["--execution.fp8_skip_last", "1"])
