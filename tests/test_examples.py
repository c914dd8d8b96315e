"""The examples run as they are written, with fewer steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets examples be imported, as where their folder is the working directory."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.slow
def test_a_loop_of_ones_own_a_score_and_an_adapter(examples: None, tmp_path: Path) -> None:
    import lora_script
    import score_texts
    import training_loop

    folder = training_loop.main(str(tmp_path), steps=12)
    assert folder.checkpoints == [12]
    likely, unlikely = score_texts.main(str(folder.path))
    assert likely < 0 and unlikely < 0
    losses = lora_script.main(str(folder.path), str(EXAMPLES), str(tmp_path), steps=6)
    assert len(losses) == 6 and all(0 < loss < 10 for loss in losses)
    assert (tmp_path / "lora_script-merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("code", "part", "name"), [
    ("import own_objective\nown_objective.main({out!r}, 4)", "objective", "capitals"),
    ("import own_model_nnx\nown_model_nnx.main({out!r}, 4)", "model", "own_nnx"),
])  # fmt: skip
def test_parts_of_ones_own(code: str, part: str, name: str, tmp_path: Path) -> None:
    """In a process of their own: names that they register stay."""
    command = [sys.executable, "-c", code.format(out=str(tmp_path))]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)})  # fmt: skip
    assert done.returncode == 0 and "finished at step 4" in done.stdout, done.stderr
    assert json.loads((tmp_path / name / "config.json").read_text())[part]["family"] == name


@pytest.mark.slow
def test_the_notebook_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, in a folder of its own; the figures that it then holds say that it learned."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / "first_look.ipynb", 4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    found = re.search(r"^([\d.]+) → ([\d.]+) bits a byte$", shown, re.MULTILINE)
    assert found and float(found[2]) < 0.6 * float(found[1]), shown
    assert shown.count("finished at step 60") == 2


def test_the_notebook_holds_what_its_cells_gave_and_no_path_of_a_machine() -> None:
    text = (EXAMPLES / "first_look.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell["outputs"] for cell in cells), "run every cell before it is stored"
    assert not [
        o for cell in cells for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"
    ]
    assert "image/png" in text and not re.search(r"[\s\"'(]/(home|root|tmp|Users|work|opt|mnt)/", text)


def test_every_example_is_listed_and_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    page, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert all(f"]({name})" in page and f"import {name.removesuffix('.py')}" in tests for name in names)
    assert all(f"]({path.name})" in page and path.name in tests for path in EXAMPLES.glob("*.ipynb"))
