"""A package of one's own adds models (plain and in Flax nnx), an objective, an adapter, an optimizer and a schedule, by
entry points or as a plugin: every command works on their runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from outside import every_second, {module}

def config():
    return Run("{name}", {module}.Config(), every_second.Config(),
               data=Data(train=("text.txt",), valid=("text.txt",), tokenizer="bytes", cache="cache"),
               optim=Optim("sign_descent", lr=1e-3, warmup=1, schedule="halved"), execution=Execution("float32"),
               train=Train(steps=4, batch_size=8, seq_len=32, prompts=(), log_every=1))
"""
ENTRY_POINTS = """
[jaxlm.models]
scaled = outside.model
scaled_nnx = outside.nnx_model:family
[jaxlm.objectives]
every_second = outside.every_second:objective
[jaxlm.adapters]
output_scale = outside.output_scale:method
[jaxlm.optimizers]
sign_descent = outside.optimizer:sign_descent
[jaxlm.schedules]
halved = outside.optimizer:halved
"""


def added_file(change: str) -> str:
    """Returns the text of the file that a change of the package in `golden/extensions` adds."""
    part = (GOLDEN / "extensions" / change).read_text().partition("new file mode")[2]
    return "\n".join(line[1:] for line in part.splitlines() if line.startswith("+") and line[:3] != "+++") + "\n"


def write_package(folder: Path, installed: bool) -> None:
    """Writes the package `outside`. An installed one names its parts by entry points; the other registers them."""
    package = folder / "outside"
    package.mkdir(parents=True)
    (package / "every_second.py").write_text(added_file("objective.diff"))
    (package / "output_scale.py").write_text(added_file("adapter.diff"))
    for name in ("model.py", "nnx_model.py", "optimizer.py"):
        text = (GOLDEN / "outside" / name).read_text()
        lines = text.splitlines(keepends=True)
        (package / name).write_text("".join(line for line in lines if not (installed and "jaxlm.register_" in line)))
    if installed:
        (package / "__init__.py").write_text("")
        about = folder / "outside-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(ENTRY_POINTS)
        return
    (package / "__init__.py").write_text(
        "import jaxlm\nfrom outside import every_second, model, nnx_model, optimizer, output_scale\n"
        "jaxlm.register_objective('every_second', every_second.objective)\n"
        "jaxlm.register_adapter('output_scale', output_scale.method)\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False], ids=["entry points", "plugin"])
def test_every_command_works_on_runs_of_another_package(installed: bool, tmp_path: Path) -> None:
    write_package(tmp_path / "elsewhere", installed)
    (tmp_path / "text.txt").write_text("\n".join(f"the {i}th line of a text" for i in range(300)))
    for name, module in (("own", "model"), ("own_nnx", "nnx_model")):
        (tmp_path / f"{name}.py").write_text(CONFIG.format(name=name, module=module))
    flags = [] if installed else ["--plugin", "outside"]

    def run(*arguments: str, status: int = 0, flags: list[str] = flags) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "jaxlm", *arguments, *flags], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'elsewhere'}", "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    for name, family in (("own", "scaled"), ("own_nnx", "scaled_nnx")):
        assert "finished at step 4" in run("train", f"{name}.py")
        written = json.loads((tmp_path / "runs" / name / "config.json").read_text())
        assert [written[part]["family"] for part in ("model", "objective")] == [family, "every_second"]
        assert written["optim"]["name"] == "sign_descent" and written["optim"]["schedule"] == "halved"
        assert "logits before and after" in run("export", f"runs/{name}", f"{name}-programs", "--format", "stablehlo")
        refused = run("export", f"runs/{name}", f"{name}-hf", status=2)  # which only models with published names have
        assert "export stablehlo" in refused and refused.count("\n") == 1 and not (tmp_path / f"{name}-hf").exists()
        assert "memory of a device" in run("plan", f"runs/{name}", "--target", "h100:8", "--analytic")
    adapter = ("--start", "runs/own", "--adapter", "output_scale")
    tuned = run("train", "own.py", "--name", "tuned", *adapter)
    assert "finished at step 4" in tuned and "optimizer: sign_descent" in tuned
    refused = run("train", "own_nnx.py", "--name", "x", "--start", "runs/own_nnx", *adapter[2:], status=2)
    assert "adapter: output_scale: this model's layers have no matrices" in refused
    for name in ("own", "own_nnx", "tuned"):
        assert "perplexity" in run("eval", f"runs/{name}")
        assert json.loads(
            run("generate", f"runs/{name}", "--prompt", "the", "--tokens", "3", "--json").splitlines()[-1]
        )
    assert "report.html" in run("report", f"runs/{'own_nnx' if installed else 'tuned'}")
    if not installed:
        refused = run("eval", "runs/own", status=2, flags=[])
        assert "model.family: unknown 'scaled'" in refused and "name its module as a plugin" in refused


def test_a_plugin_that_is_missing_or_fails_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    from jaxlm.commands import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_nowhere\n")
    for name, words in {
        "no_such_plugin": "plugin: no module no_such_plugin; install its package",
        "none.py": "plugin: no file none.py",
        "broken_plugin": "plugin: broken_plugin fails: ZeroDivisionError: division by zero",
        "needs_more.py": "plugin: needs_more.py needs a module that is missing: a_module_that_is_nowhere",
    }.items():
        assert cli.main(["eval", "x", "--plugin", name]) == 2
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1
