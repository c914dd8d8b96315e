"""A coordinate check passes under μP and fails under standard scaling; nothing but figures tells the two apart."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import Data, Execution, Optim, Run, Train, Transfer
from jaxlm.assembly import coordinate_check
from jaxlm.assembly.coordinate_check import Activation, Result, Settings
from jaxlm.commands import cli
from jaxlm.models import gpt2, llama
from jaxlm.objectives import causal

LLAMA = llama.Config(vocab=264, layers=1, width=32, heads=2, kv_heads=2, head_width=16, ffn=32, positions=32)
GPT2 = gpt2.Config(vocab=264, layers=2, width=32, heads=2, positions=32)
MUP = Transfer("mup", base_width=32, base_head_width=16)


pytestmark = pytest.mark.usefixtures("one_device")


def run(folder: Path, model: Any, optimizer: str, transfer: Transfer) -> Run:
    text = folder / "x.txt"
    text.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}, and so on.\n" for i in range(2000)))
    data = Data(train=(str(text),), tokenizer="bytes", cache=str(folder / "cache"), tokenize_workers=1)
    return Run("r", model, causal.Config(), data, Optim(name=optimizer, lr=2e-2), transfer=transfer,
               train=Train(steps=50, batch_size=8, seq_len=32), execution=Execution(dtype="float32"))  # fmt: skip


def test_what_training_does_is_the_same_at_both_widths_under_mup_alone(tmp_path: Path) -> None:
    settings = Settings(widths=(128, 32), updates=4, repeats=1)
    found = {
        method: coordinate_check.check(run(tmp_path, LLAMA, "adamw", transfer), settings)
        for method, transfer in (("mup", MUP), ("none", Transfer()))
    }
    assert not found["mup"].faults
    assert {"layer 0 hidden", "layer 0 q", "logits"} <= found["none"].faults.keys()
    assert [a.widths for a in found["mup"].activations] == [(32, 128)] * 9
    np.testing.assert_array_equal(*([a.changes[:, 0] for a in found[m].activations] for m in found))  # the base
    assert not any(a.changes[0].any() for a in found["mup"].activations)


@pytest.mark.slow
@pytest.mark.parametrize("model", [LLAMA, GPT2])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_slopes_over_four_widths_and_two_seeds(model: Any, optimizer: str, tmp_path: Path) -> None:
    settings = Settings(widths=(32, 64, 128, 256))
    ours = coordinate_check.check(run(tmp_path, model, optimizer, MUP), settings)
    standard = coordinate_check.check(run(tmp_path, model, optimizer, Transfer()), settings)
    assert not ours.faults and "logits" in standard.faults


def activation(sizes: list[float], changes: list[float]) -> Activation:
    return Activation("hidden", 0, (64, 128, 256), np.array([sizes, sizes]), np.array([[0.0] * 3, changes]))


def test_faults_are_told_by_the_slopes() -> None:
    assert math.isclose(coordinate_check.slope((64, 128, 256), [3.0, 6.0, 12.0]), 1.0)
    assert activation([1, 1, 1], [2, 2.2, 2.1]).fault(0.3) == ""
    assert activation([4, 2, 1], [2, 2, 2]).fault(0.3) == ""  # logits of fresh weights, whose sum is over more of them
    assert activation([1, 2, 4], [2, 2, 2]).fault(0.3) == "grows with the width"
    assert activation([1, 1, 1], [1, 2, 4]).fault(0.3) == "change grows with the width"
    assert activation([1, 1, 1], [4, 2, 1]).fault(0.3) == "change vanishes with the width"
    assert activation([1, 1, 1], [0, 0, 0]).fault(0.3) == "does not change"
    assert activation([1, math.nan, 1], [1, 1, 1]).fault(0.3) == "not finite"


def test_the_command_shows_and_draws_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def check(run: Run, settings: Settings, told: Any) -> Result:
        told(64, 0)
        assert settings == Settings((64, 128, 256), 2, 1, 0.25) and run.transfer.base_width == 64
        rows = activation([1, 1, 1], [1, 1, 1]), activation([1, 2, 4], [1, 2, 4])
        return Result(rows[: 1 + (run.optim.lr > 0.1)], settings.tolerance)

    monkeypatch.setattr(coordinate_check, "check", check)
    picture = tmp_path / "check.png"
    words = ["coordinate-check", "tiny_llama", "--widths", "64", "128", "256", "--updates", "2", "--repeats", "1",
             "--tolerance", "0.25", "--transfer.method", "mup", "--transfer.base_width", "64"]  # fmt: skip
    assert cli.main([*words, "--picture", str(picture)]) == 0 and picture.stat().st_size > 1000
    assert "passes: the changes of all 1 activations" in capsys.readouterr().out
    assert cli.main([*words, "--optim.lr", "1", "--json"]) == 1
    printed, said = capsys.readouterr()
    assert "fails: 1 of 2 activations, first layer 0 hidden: grows with the width" in said
    assert json.loads(printed)["activations"]["layer 0 hidden"]["fault"] == "grows with the width"
    for place, message in ((tmp_path / "x.txt", "ends so"), (tmp_path / "no" / "x.png", "no such folder")):
        assert cli.main([*words, "--picture", str(place)]) == 2 and message in capsys.readouterr().err
