"""The examples run as they are written, with fewer steps."""

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
    assert (tmp_path / "lora-merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_an_objective_of_ones_own(examples: None, tmp_path: Path) -> None:
    import own_objective

    folder = own_objective.main(str(tmp_path), steps=4)
    assert folder.config.objective == own_objective.Config(capitals=3.0) and folder.finished


@pytest.mark.slow
def test_a_flax_module_of_ones_own(examples: None, tmp_path: Path) -> None:
    import own_model_nnx

    folder = own_model_nnx.main(str(tmp_path), steps=4)
    assert folder.finished and type(folder.open().config) is own_model_nnx.Config


def test_every_example_is_listed_and_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    page, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert all(f"]({name})" in page and f"import {name.removesuffix('.py')}\n" in tests for name in names)
