"""The type checker reports an objective whose functions don't have the signatures that everyone calls."""

import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm

CAUSAL = Path(jaxlm.__file__).parent / "objectives" / "causal.py"
BROKEN = {
    "loss": ("key: jax.Array | None) -> Sums:", "key: int) -> Sums:"),
    "totals": ("def totals(batch: DeviceBatch) -> dict[str, jax.Array]:", "def totals(batch: DeviceBatch) -> float:"),
    "example": ("record: Window, row: RowShape, tokenizer", "record: Window, tokenizer"),
}


@pytest.mark.slow
def test_broken_signatures_are_reported_where_the_objective_is_made(tmp_path):
    pytest.importorskip("mypy")
    text = CAUSAL.read_text()
    for old, new in BROKEN.values():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "causal.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--shadow-file", str(CAUSAL),
               str(tmp_path / "causal.py"), str(CAUSAL)]  # fmt: skip
    done = subprocess.run(command, cwd=CAUSAL.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    for name in BROKEN:
        assert f'Argument "{name}" to "Objective" has incompatible type' in done.stdout
