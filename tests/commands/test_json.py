"""Every command takes `--json`: its results are one JSON object, all that it prints on standard output."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxlm.commands import cli
from jaxlm.commands.arguments import Done, as_json
from jaxlm.core import typed_arguments

CONFIG = """
from jaxlm import Data, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal


def config():
    model = llama.Config(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16)
    data = Data(train=("x.txt",), valid=("y.txt",), test=("z.txt",), tokenizer="bytes", cache="cache",
                tokenize_workers=1)
    return Run("r", model, causal.Config(), out="runs", train=Train(steps=1, batch_size=8, seq_len=16), data=data,
               optim=Optim(warmup=0))
"""
POSITIONAL = {
    "model": ["m"], "base": ["b"], "target": ["t"], "config": ["quickstart"], "file": ["f"], "folder": ["r"],
    "source": ["x.txt"], "models": ["m", "n"], "shell": ["bash"],
    "out": ["--out", "o.model"], "method": ["--method", "mask"],
}  # fmt: skip


def arguments(name: str) -> list[str]:
    """Returns values of the arguments that a command can't do without."""
    kind = cli.command(name)
    given = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    positional = typed_arguments.positional(kind)
    words = [word for f in given if f in positional for word in POSITIONAL[f]]
    flags = [
        word for f in given if f not in positional for word in (POSITIONAL[f] if f != "model" else ["--model", "m"])
    ]
    return [*name.split(), *words, *flags]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_its_results_are_all_of_the_output(name, monkeypatch, capsys):
    def run(self, rest):
        print("a word for people")
        return Done({"figures": {"loss": np.float32(0.5), "worst": math.inf}, "out": Path("x")}, 1)

    monkeypatch.setattr(cli.command(name), "run", run)
    assert cli.main([*arguments(name), "--json"]) == 1
    printed, said = capsys.readouterr()
    assert json.loads(printed) == {"figures": {"loss": 0.5, "worst": None}, "out": "x"} and printed.count("\n") == 1
    assert said == "a word for people\n"
    assert cli.main(arguments(name)) == 1 and capsys.readouterr() == ("a word for people\n", "")


QUICK = {
    "plan": (["c.py", "--target", "v5e:2x4", "--analytic"], {"seconds", "memory_bytes", "fits"}),
    "tokenizer train": (["x.txt", "--vocab", "300", "--out", "x.model"], {"out", "pieces"}),
    "data prepare": (["c.py"], {"sources"}),
    "data inspect": (["c.py", "--examples", "1"], {"sources", "examples"}),
    "train": (["c.py", "--dry-run"], {"config", "parameters", "sources", "memory_bytes"}),
    "completion": (["bash"], {"script"}),
}  # fmt: skip


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", QUICK)
def test_what_it_says_is_what_it_found(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(CONFIG)
    for i, file in enumerate(("x.txt", "y.txt", "z.txt")):
        Path(file).write_text(f"part {i}: {' '.join(map(str, range(300)))} of a few words and letters")
    words, keys = QUICK[name]
    assert cli.main([*name.split(), *words, "--json"]) == 0
    printed, _ = capfd.readouterr()
    found = json.loads(printed)
    assert keys <= set(found)
    if "sources" in found:
        assert [(x["part"], x["source"], x["documents"]) for x in found["sources"]] == [
            ("train", "x.txt", 1), ("valid", "y.txt", 1), ("test", "z.txt", 1)
        ]  # fmt: skip
    if name == "data inspect":
        assert len(found["examples"][0]["tokens"]) == 16


def test_values_are_json_s_own():
    given = {"a": (1, np.arange(2)), Path("b"): {None, True}, "c": np.float64("nan"), "d": np.bool_(True)}
    assert as_json(given) in ({"a": [1, [0, 1]], "b": [None, True], "c": None, "d": True},
                              {"a": [1, [0, 1]], "b": [True, None], "c": None, "d": True})  # fmt: skip
