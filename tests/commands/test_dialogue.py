"""Conversations and preferences end to end: from files through the command line to a model that learned them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import published

from jaxlm.assembly import open_model
from jaxlm.commands import cli
from jaxlm.data.tokenizer import Bytes
from jaxlm.objectives import preference, sft
from jaxlm.objectives.objective import RowShape
from jaxlm.training.log import read_lines

pytest.importorskip("jinja2")

CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import preference, sft

def config():
    return Run("r", llama.Config(vocab=264, layers=1, width=32, heads=2, kv_heads=2, head_width=16, ffn=64),
               {objective}, out={out!r}, data=Data(train=({data!r},), tokenizer="bytes", holdout=0.1),
               optim=Optim(lr=1e-2, warmup=1), execution=Execution("float32"),
               train=Train(steps=6, batch_size=8, seq_len=64, prompts=(), save_every=3, log_every=1))
"""
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"


def config_file(tmp_path: Path, objective: str, rows: list[dict]) -> str:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "c.py"
    file.write_text(CONFIG.format(objective=objective, data=str(data), out=str(tmp_path)))
    return str(file)


@pytest.mark.usefixtures("one_device")
def test_conversations_are_learned(tmp_path, capsys):
    rows = [dict(messages=[dict(role="user", content=f"say {i}"), dict(role="assistant", content=f"yes {i}")])
            for i in range(30)]  # fmt: skip
    file = config_file(tmp_path, f"sft.Config(template={TEMPLATE!r})", [*rows, dict(prompt="x" * 80, completion="y")])
    assert cli.main(["train", file]) == 0
    shown = capsys.readouterr().out
    assert "1 of 31 conversations lose their end" in shown and "1 conversations left out" in shown
    train = [line for line in read_lines(tmp_path / "r" / "metrics.jsonl") if line["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"]
    # Only "yes N</s>" counts: 6 or 7 of some 30 tokens.
    assert train[0]["weight/tokens"] < 0.3 * 8 * 64
    # Tokens are those that are read: rows end in padding where no whole conversation fits.
    assert 0.5 * 8 * 64 < train[0]["tokens"] < 8 * 64 and 5 * 0.5 * 8 * 64 < train[-1]["tokens"] < 6 * 8 * 64
    assert cli.main(["eval", str(tmp_path / "r")]) == 0


def test_a_row_holds_several_conversations_that_do_not_see_each_other():
    row = RowShape(64, template=TEMPLATE)
    tokens = Bytes()
    file = Path(__file__).parents[1] / "nothing.jsonl"
    with pytest.raises(ValueError, match="does not exist"):
        sft.read(sft.Config(), str(file), row, tokens)
    texts = [sft.render_chat.Tokens([1, 2, 3, 4], [False, False, True, True])] * 3
    out = sft.example(sft.Config(), dict(texts=texts), RowShape(15), tokens, np.random.default_rng(0))
    assert out["segments"].tolist()[:12] == [1] * 4 + [2] * 4 + [3] * 4
    assert out["weights"].tolist()[:12] == [0, 1, 1, 0] * 3
    whole = sft.example(sft.Config(everything=True), dict(texts=texts), RowShape(15), tokens, np.random.default_rng(0))
    assert whole["weights"].tolist()[:12] == [1, 1, 1, 0] * 3


PAIRS = [dict(prompt=f"q{i}", chosen=f"good {i}", rejected=f"bad {i}") for i in range(24)]


@pytest.mark.parametrize("method", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_preferences_are_learned_and_a_stopped_run_goes_on_with_its_reference(tmp_path, method, capsys):
    file = config_file(tmp_path, f"preference.Config(method={method!r})", PAIRS)
    assert cli.main(["train", file]) == 0
    log = [line for line in read_lines(tmp_path / "r" / "metrics.jsonl") if line["kind"] == "train"]
    valid = [line for line in read_lines(tmp_path / "r" / "metrics.jsonl") if line["kind"] == "valid"]
    assert abs(valid[0]["loss"] - (np.log(2) if method == "dpo" else 0.5)) < 1e-4  # nothing gained yet
    assert log[-1]["margin"] > log[0]["margin"] and valid[-1]["accuracy"] == 1
    shutil.copytree(tmp_path / "r", tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config | {"name": "cut"}))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")  # as a kill after step 3 leaves it
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "cut" / "metrics.jsonl").write_text("\n".join(line for line in lines if '"end"' not in line) + "\n")
    assert cli.main(["train", str(tmp_path / "cut")]) == 0
    a, b = (open_model.open_model(tmp_path / name).params["blocks"]["q"] for name in ("r", "cut"))
    np.testing.assert_array_equal(a, b)
    (tmp_path / "cut" / "reference.npz").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    (tmp_path / "cut" / "metrics.jsonl").write_text("\n".join(line for line in lines if '"end"' not in line) + "\n")
    capsys.readouterr()
    assert cli.main(["train", str(tmp_path / "cut")]) == 2
    assert "reference.npz: is gone" in capsys.readouterr().err


def test_pairs_in_the_usual_forms(tmp_path):
    row, c = RowShape(64), preference.Config()
    user, good, bad = ({"role": r, "content": t} for r, t in (("user", "q"), ("assistant", "g"), ("assistant", "b")))
    forms = [dict(prompt="q", chosen="g", rejected="b"), dict(chosen=[user, good], rejected=[user, bad]),
             dict(prompt=[user], chosen=[good], rejected=[bad])]  # fmt: skip
    data, tokens = tmp_path / "d.jsonl", Bytes()
    for form in forms:
        data.write_text(json.dumps(form))
        [item], notes = preference.read(c, str(data), row, tokens)
        assert item["texts"] == [
            ([tokens.bos_id, *b"qg", tokens.eos_id], 2),
            ([tokens.bos_id, *b"qb", tokens.eos_id], 2),
        ]
        assert notes == [] and item["reference"] == [0.0, 0.0]
    data.write_text(json.dumps(dict(prompt="q", chosen="g")))
    with pytest.raises(ValueError, match=r"d.jsonl:1: no 'chosen' and 'rejected'; fields: prompt, chosen"):
        preference.read(c, str(data), row, tokens)


def test_a_published_model_is_asked_as_it_is(tmp_path, capsys):
    """Without training: what it answers to a file's questions, to compare a tuned model with."""
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(json.dumps(dict(question=f"say {i}", answer=f"{i}")) for i in range(3)))
    asked = ["eval", str(published(tmp_path / "llama")), "--metric", "exact", "--data", str(file), "--tokens", "4"]
    assert cli.main([*asked, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["texts"] == 3
    assert len((tmp_path / "out" / "texts.jsonl").read_text().splitlines()) == 3
    for flag in ("--limit", "--tokens"):
        assert cli.main([*asked, flag, "0"]) == 2
        assert f"{flag}: 0 is out of range; it must be at least 1" in capsys.readouterr().err
