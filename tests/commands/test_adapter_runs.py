"""Runs that train an adapter, from the command line: what is trained, continued, evaluated, exported, and refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support.tiny_models import published

from jaxlm.assembly import model_source, open_model
from jaxlm.commands import cli
from jaxlm.core import config, tree
from jaxlm.training.log import read_lines
from jaxlm.weights import adapters

CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal

def config():
    return Run("r", llama.Config(), causal.Config(),
               data=Data(train=({file!r},), valid=({file!r},), tokenizer="bytes", cache={cache!r}),
               optim=Optim(lr=1e-2, warmup=1), execution=Execution("float32"), out={out!r},
               train=Train(steps=4, batch_size=8, seq_len=32, eval_every=4, save_every=2, prompts=()))
"""
METHODS = ("lora", "dora", "pissa", "adalora", "vera", "ia3", "houlsby", "parallel", "prefix", "prompt", "p_tuning",
           "norms")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "text.txt").write_text("\n".join(f"the {i}th line of a text" for i in range(300)))
    names = dict(file=str(folder / "text.txt"), cache=str(folder / "cache"), out=str(folder / "runs"))
    (folder / "c.py").write_text(CONFIG.format(**names))
    published(folder / "llama")
    return folder


def train(home: Path, name: str, *flags: str, start: str | None = None) -> Path:
    place = start or str(home / "llama")
    assert cli.main(["train", str(home / "c.py"), "--name", name, "--start", place, *flags]) == 0
    return home / "runs" / name


def settings(method: str, base: str = "float32") -> list[str]:
    small = {"rank": "2", "tokens": "3", "reduction": "4", "target_rank": "1"}
    has = [f.name for f in dataclasses.fields(adapters.METHODS[method].Config) if f.name in small]
    fields = [text for name in has for text in (f"--adapter.{name.replace('_', '-')}", small[name])]
    return ["--adapter", method, "--adapter.base", base, *fields]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] in ("train", "valid")]


def evaluated(capsys, place: str | Path, home: Path) -> float:
    capsys.readouterr()
    assert cli.main(["eval", str(place), "--data", str(home / "text.txt"), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]


def complaint(capsys, *args: str) -> str:
    capsys.readouterr()
    assert cli.main([str(a) for a in args]) == 2
    line = capsys.readouterr().err
    assert line.startswith("jaxlm: ") and line.count("\n") == 1
    return line


@pytest.mark.parametrize(("method", "base"), [
    pytest.param(method, base, marks=() if (method, base) == ("adalora", "nf4") else
                 pytest.mark.slow)
    for method in METHODS for base in ("float32", "nf4")
])  # fmt: skip
@pytest.mark.usefixtures("one_device")
def test_a_continued_run_is_the_uninterrupted_one(method, base, home):
    whole = train(home, f"{method}-{base}", *settings(method, base), "--train.log-every", "1")
    cut = home / "cut" / whole.name
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    lines = [x for x in read_lines(cut / "metrics.jsonl") if x.get("name") != "end"]
    (cut / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert cli.main(["train", str(cut)]) == 0
    assert losses(cut) == losses(whole)
    states = [tree.flatten(open_model.open_model(folder).params) for folder in (whole, cut)]
    for path, x in states[0].items():
        np.testing.assert_array_equal(states[1][path], x, err_msg=path)
    first = np.inf if method == "prefix" else losses(whole)[0]
    assert losses(whole)[-1] < first
    sizes = {kind: sum(f.stat().st_size for f in (whole / kind).rglob("*") if "/d/" in str(f)) for kind in
             ("base", "checkpoints/checkpoint-4/params")}  # fmt: skip
    assert method == "p_tuning" or sizes["checkpoints/checkpoint-4/params"] < sizes["base"], "the base is kept once"


@pytest.mark.usefixtures("one_device")
def test_from_a_run_to_pefts_files_and_back(home, tmp_path, capsys):
    """One run: evaluated as itself, merged, and as its adapter on the model it began from."""
    run = train(home, "whole", *settings("lora"), "--train.steps", "6")
    assert evaluated(capsys, run, home) == pytest.approx(losses(run)[-1], rel=1e-6)
    for format in ("peft", "hf"):
        assert cli.main(["export", str(run), str(tmp_path / format), "--format", format, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["relative_difference"] < 1e-5
    names = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert set(names) == {
        f"base_model.model.model.layers.0.self_attn.{m}_proj.lora_{ab}.weight" for m in "qv" for ab in "AB"
    }
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(home / "llama") and told["target_modules"] == ["q_proj", "v_proj"]
    on = f"{home / 'llama'}+{tmp_path / 'peft'}"
    loss = evaluated(capsys, on, home)
    assert loss < evaluated(capsys, home / "llama", home) - 0.05
    for place in (tmp_path / "hf", tmp_path / "peft"):
        assert evaluated(capsys, place, home) == pytest.approx(loss, rel=1e-5)

    assert cli.main(["generate", on, "--prompt", "the 7", "--tokens", "4", "--json"]) == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])["texts"]
    assert cli.main(["generate", str(run), "--prompt", "the 7", "--tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["texts"] == one

    prompts = ["--prompt", "the 7", "--prompt", "the 7", "--tokens", "4", "--json"]
    both = ["--adapter", str(tmp_path / "peft"), "--adapter", "-"]
    assert cli.main(["generate", str(home / "llama"), *prompts, *both]) == 0
    mixed = json.loads(capsys.readouterr().out.splitlines()[-1])["texts"]
    assert mixed[0] == one[0] != mixed[1]
    assert "give one for each --prompt" in complaint(capsys, "generate", home / "llama", *prompts, *both[:2])

    again = train(home, "further", "--optim.lr", "1e-3", start=on)
    assert isinstance(model_source.describe(again).adapter, adapters.Lora)
    assert losses(again)[0] < losses(run)[0] - 0.05, "it goes on from what was learned"
    other = complaint(
        capsys, "train", home / "c.py", "--name", "x", "--start", on, *settings("lora"), "--adapter.alpha", "4"
    )
    assert "has an adapter of other settings than this run's" in other and "jaxlm export" in other


@pytest.mark.slow  # by default weights/adapters/test_methods.py merges a method of four bits
def test_a_quantized_base_is_merged_in_full_precision(home, tmp_path, capsys):
    """What training saw, not what the base was before: rounding the sum anew would lose what was learned."""
    run = train(home, "few-bits", *settings("lora", "nf4"), "--adapter.targets", "all")
    assert cli.main(["export", str(run), str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["relative_difference"] < 1e-5


def test_what_can_not_be_is_refused(home, tmp_path, capsys):
    c, base = str(home / "c.py"), str(home / "llama")

    def refused(*flags: str) -> str:
        return complaint(capsys, "train", c, "--name", "bad", "--start", base, *flags)

    assert "adapter.base: nf4 weights can't be trained; choose a method, as --adapter lora" in refused(
        "--adapter.base", "nf4"
    )
    assert "adapter.targets: pattern 'wq' matches no parameter; there are: blocks/down" in refused(
        *settings("lora"), "--adapter.targets", "wq"
    )
    assert "adapter.rank: 0 is out of range; it must be at least 1" in refused(*settings("lora"), "--adapter.rank", "0")
    assert "adapter.rank: 99 does not fit blocks/q, whose rank is at most 16" in refused(
        *settings("pissa"), "--adapter.rank", "99"
    )
    assert "bitfit: this model has no bias" in refused(*settings("bitfit"))
    norms = train(home, "norms-only", *settings("norms"), "--train.steps", "2", "--optim.ema", "0.5")
    assert evaluated(capsys, norms, home) == pytest.approx(losses(norms)[-1], rel=1e-6), "by its averaged weights"
    assert "--format peft: PEFT has no files for norms" in complaint(
        capsys, "export", norms, tmp_path / "x", "--format", "peft"
    )
    assert "has no adapter" in complaint(capsys, "export", base, tmp_path / "x", "--format", "peft")
    own = tmp_path / "lost"
    own.mkdir()
    (own / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=2, lora_alpha=2)))
    safetensors.numpy.save_file({"x.lora_A.weight": np.zeros((2, 2), np.float32)}, own / "adapter_model.safetensors")
    assert f"names no base model, which is not here; give it as MODEL+{own}" in complaint(capsys, "eval", own)
    assert "x.lora_A.weight fits no weight of the base model" in complaint(
        capsys, "eval", f"{base}+{own}", "--data", str(home / "text.txt")
    )
    assert not (tmp_path / "x").exists() and config.Adapter() == model_source.describe(base).adapter
