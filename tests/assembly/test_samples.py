"""Samples of a run: open-ended text is drawn, answers are the likeliest and stand apart from what they answer."""

import json
from types import SimpleNamespace

import pytest

from jaxlm.assembly import run_objective, training_hooks
from jaxlm.core import config
from jaxlm.data.tokenizer import Bytes
from jaxlm.inference.generate import Completion
from jaxlm.models import llama, t5
from jaxlm.objectives import causal, preference, prefix, seq2seq, sft
from jaxlm.training.board.sections import after_prompt
from jaxlm.training.log import RunLog

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<sep>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
TOKENS = Bytes()


def spelled(ids: list[int]) -> str:
    return "".join(TOKENS.piece(id) if id > 255 else chr(id) for id in ids)


@pytest.mark.parametrize(
    ("objective", "model", "read", "goes_on"),
    [
        (causal.Config(), llama, "<s>Hi", True),
        (prefix.Config(), llama, "<s>Hi", True),
        (sft.Config(template=TEMPLATE), llama, "user: Hi<sep>assistant: ", False),
        (sft.Config(), llama, "<s>Hi", False),
        (preference.Config(template=TEMPLATE), llama, "user: Hi<sep>assistant: ", False),
        (seq2seq.Config(), llama, "<s>Hi<sep>", False),
        (seq2seq.Config(), t5, "\0", False),
    ],
    ids=lambda x: type(x).__module__.rpartition(".")[2] if hasattr(x, "__dataclass_fields__") else "",
)
def test_answers_are_greedy_and_stand_apart(objective, model, read, goes_on, tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2")
    asked = {}

    class Generator:
        def __init__(self, model, eos, used, both_ways):
            asked["eos"] = eos

        def __call__(self, params, prompts, how, source):
            asked.update(prompts=prompts, how=how, source=source)
            return [[Completion([104, 111], "stop")] for _ in prompts]

    monkeypatch.setattr(training_hooks, "Generator", Generator)
    run = config.Run("r", model.Config(), objective, out=str(tmp_path), train=config.Train(prompts=("Hi",), steps=2))
    run.folder.mkdir()
    bound = run_objective.bind_run(run, TOKENS)
    program = SimpleNamespace(run=run, objective=bound, tokens=TOKENS, model=None)
    with RunLog(run.folder, tensorboard=False) as log:
        training_hooks.sampler(program, log)(0, SimpleNamespace(eval_params=None))
    assert spelled(asked["prompts"][0]) == read
    assert (asked["how"].temperature > 0) == goes_on
    assert (TOKENS.sep_id in asked["eos"]) == bool(getattr(objective, "template", "")), (
        "what ends a turn ends an answer"
    )
    expected = "Hiho" if goes_on else "Hi\n→ ho"
    assert f"── sample before training ──\n{expected}\n" in capsys.readouterr().out
    [line] = [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines() if '"sample"' in x]
    assert expected in (run.folder / "samples.txt").read_text()
    assert after_prompt(line) == f"{'' if goes_on else chr(10) + '→ '}ho"
