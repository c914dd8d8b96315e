"""A run that the command line names knows where each of its values comes from."""

from pathlib import Path

from support.tiny_models import published

from jaxlm.commands import arguments
from jaxlm.commands.train import Train

CONFIG = """
from jaxlm import Data, Optim, Run, Train
from jaxlm.models import bert
from jaxlm.objectives import classify


def config() -> Run:
    return Run("r", bert.Config(), classify.Config(), data=Data(train=("table.csv",), holdout=0.0),
               optim=Optim(lr=1e-3), train=Train(steps=10, seq_len=32))
"""


def test_each_value_comes_from_where_it_was_given_last(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    (tmp_path / "table.csv").write_text("text,label\ngood,yes\nbad,no\n")
    (tmp_path / "o.yaml").write_text("train: {steps: 20, eval_every: 5}\n")
    start = published(tmp_path / "bert", "bert")
    given = ["c.py", "--overrides", "o.yaml", "--start", str(start), "--optim.lr", "1e-3", "--train.eval-every=7"]
    command, rest = arguments.parse(Train, [*given, "--data.no-document-mask"])
    assert isinstance(command, Train)
    run, _, origins = command.load(rest)
    assert (run.train.steps, run.train.eval_every, run.optim.lr, run.objective.labels) == (20, 7, 1e-3, ("no", "yes"))
    told = {
        "train.seq_len": "config file",
        "model.width": "start model",
        "train.steps": "overrides file",
        "train.eval_every": "command line",
        "optim.lr": "command line",  # though the config file has the same value
        "data.document_mask": "command line",
        "objective.labels": "training data",
    }
    assert {key: origins[key] for key in told} == told
