"""Run directories that version 0.1.0 wrote before its modules moved into rooms still open, evaluate and continue.

`golden/run_directories.tar.gz` holds two of them, trained for two steps on the text beside them: one of all weights and
one of a LoRA adapter that starts from the first. The losses are those that the old code printed.
"""

import json
import tarfile
from pathlib import Path

import pytest

from jaxlm.commands import cli

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
