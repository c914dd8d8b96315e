"""A new family, objective or adapter method is one file and one row of a table: `golden/extensions/` has three such
changes, which are applied to a copy of the package and trained by the command line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHANGES = sorted((ROOT / "tests" / "golden" / "extensions").glob("*.diff"))
CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import MODELS
from jaxlm.objectives import OBJECTIVES

def config():
    return Run("base", MODELS["bigram"].Config(vocab=384), OBJECTIVES["every_second"].Config(),
               data=Data(train=({text!r},), valid=({text!r},), tokenizer="bytes", cache={cache!r}, tokenize_workers=1),
               optim=Optim(lr=1e-2, warmup=1), execution=Execution("float32"), out={out!r},
               train=Train(steps=4, batch_size=8, seq_len=32, eval_every=4, save_every=4, prompts=()))
"""


def test_each_change_adds_one_file_and_the_rows_of_one_table():
    assert [change.stem for change in CHANGES] == ["adapter", "family", "objective"]
    for change in CHANGES:
        text = change.read_text()
        assert text.count("diff --git") == 2 and text.count("new file mode") == 1, change.name
        changed = [line for line in text.partition("diff --git")[2].splitlines() if line.startswith("-  ")]
        assert len(changed) <= 1, f"{change.name} rewrites more than an import"


@pytest.mark.slow
def test_what_they_add_is_trained_and_adapted_by_its_name(tmp_path):
    shutil.copytree(ROOT / "jaxlm", tmp_path / "jaxlm", ignore=shutil.ignore_patterns("__pycache__"))
    for change in CHANGES:
        subprocess.run(["git", "apply", "--verbose", str(change)], cwd=tmp_path, check=True)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {i}th line of a text" for i in range(300)))
    names = dict(text=str(text), cache=str(tmp_path / "cache"), out=str(tmp_path / "runs"))
    (tmp_path / "c.py").write_text(CONFIG.format(**names))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "jaxlm", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "finished at step 4" in run("train", "c.py")
    base = str(tmp_path / "runs" / "base")
    assert "finished at step 4" in run("train", "c.py", "--name", "tuned", "--start", base, "--adapter", "output_scale")
    assert "loss" in run("eval", str(tmp_path / "runs" / "tuned"))
