"""Local tasks of the lm-evaluation-harness, from its YAML to results on disk; begin-of-text tokens never come twice."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from support.harness_tasks import TASKS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval")

from jaxlm.commands import cli
from jaxlm.core import config, spec
from jaxlm.data.tokenizer import Bytes
from jaxlm.evaluation import harness
from jaxlm.evaluation.likelihood import Request
from jaxlm.formats import huggingface
from jaxlm.inference.generate import Generator
from jaxlm.inference.sampling import Sampling
from jaxlm.models import llama, t5
from jaxlm.models.model import Model
from jaxlm.nn.layout import Layout

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own and its packages'
TOKENS = Bytes()


def make(family=llama):
    c = family.Config(vocab=264, layers=1, width=16, heads=2, head_width=8, ffn=24, positions=128,
                      **(dict(kv_heads=1) if family is llama else {}))  # fmt: skip
    specs = family.specs(c)
    layout = Layout.of(config.Mesh(), config.Execution(dtype="float32"))
    return Model(family, c, specs, layout), jax.tree.map(lambda w: 2 * w, spec.init(specs, jax.random.key(0)))


def adapter(before=(), template=None, family=llama) -> harness.Harness:
    model, weights = make(family)
    return harness.Harness(model, Generator(model, [TOKENS.eos_id], 264), weights, TOKENS, (list(before), []), rows=4,
                           template=template)  # fmt: skip


def asked(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [dict(q=f"Question {i}?", choices=["yes", "no"], gold=i % 2) for i in range(3)]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "whole.jsonl").write_text("\n".join(json.dumps(dict(text="some text " * n)) for n in (2, 20)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    model, weights = make()
    TOKENS.save(folder / "bytes")
    huggingface.save(folder / "model", llama, model.config, model.specs, weights, dtype="float32", card=False,
            extra_files_from=folder / "bytes")  # fmt: skip
    return folder


def test_the_command_line_leaves_results_and_every_example(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    args = ["eval", str(home / "model"), "--tasks", "choice,whole,answer", "--task-folder", str(home), "--json"]
    assert cli.main([*args, "--out", str(out)]) == 0
    printed, shown = capsys.readouterr()
    assert "begin of text: every text begins with <s>" in shown and "|choice" in shown
    found = json.loads(printed)
    assert found["results"] == json.loads((out / "results.json").read_text())["results"]
    assert found["n-samples"]["choice"]["effective"] == 3
    examples = [json.loads(line) for line in (out / "choice.jsonl").read_text().splitlines()]
    lm = adapter([TOKENS.bos_id])
    expected = lm.loglikelihood([asked("Question 0?", " yes"), asked("Question 0?", " no")])
    got = [likelihood for likelihood, _ in examples[0]["filtered_resps"]]
    assert [float(x) for x in got] == pytest.approx([x for x, _ in expected], abs=1e-4)
    text = "some text " * 20
    whole = lm.loglikelihood_rolling([asked(text)])[0]
    rows = [json.loads(line) for line in (out / "whole.jsonl").read_text().splitlines()]
    assert rows[1]["bits_per_byte"][0] == pytest.approx(whole, rel=1e-5)
    args = ["eval", str(home / "model"), "--tasks", "choice,whole", "--task-folder", str(home), "--out", str(out)]
    assert cli.main([*args, "--against", str(home / "model")]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["differences"]["choice"]["acc"]["p"] is None and found["sizes"]["whole"] == "2 examples"
    assert found["differences"]["whole"]["bits_per_byte"]["value"] == pytest.approx(
        found["results"]["whole"]["bits_per_byte,none"]
    )
    assert (out / "against" / "results.json").is_file()
    assert cli.main(["eval", str(home / "model"), "--tasks", "choise", "--task-folder", str(home)]) == 2
    assert "--tasks: unknown 'choise'; did you mean 'choice'?" in capsys.readouterr().err


def test_one_begin_of_text_and_never_two(monkeypatch):
    seen: list[Request] = []
    bos = TOKENS.bos_id
    for before in ([], [bos]):
        lm = adapter(before)
        monkeypatch.setattr(lm, "scorer", lambda rs: seen.extend(rs) or [])
        lm.loglikelihood([asked("ab", " c"), asked("", "de"), asked(" ", "f")])
        seen.extend([None])
    plain, own = seen[:3], seen[4:7]
    assert plain == [Request([97, 98], [32, 99]), Request([bos], [100, 101]), Request([bos], [32, 102])]
    assert [list(r.context) for r in own] == [[bos, 97, 98], [bos], [bos]]
    chats = adapter([bos], template="{{ bos_token }}{{ messages[0].content }}")
    text = chats.apply_chat_template([dict(role="user", content="hi")])
    assert chats.tok_encode(text) == [bos, *b"hi"] and adapter([bos]).tok_encode("hi") == [bos, *b"hi"]


def test_answers_stop_and_come_in_the_order_of_the_questions():
    lm = adapter()
    prompts = ["a", "bbbb", "cc"]
    free = lm.generate_until([asked(p, dict(until=[], max_gen_toks=12)) for p in prompts])
    alone = [lm.generate_until([asked(p, dict(until=[], max_gen_toks=12))])[0] for p in prompts]
    assert free == alone and len(set(free)) == 3
    stop = free[0][2:4]
    [cut] = lm.generate_until([asked("a", dict(until=[stop], max_gen_toks=12))])
    assert cut == free[0][: free[0].index(stop)]


def test_an_encoder_decoder_reads_the_context():
    lm = adapter(family=t5)
    [(yes, _), (no, _)] = lm.loglikelihood([asked("one", "yes"), asked("two", "yes")])
    assert yes != no
    with pytest.raises(ValueError, match="only decoders"):
        lm.loglikelihood_rolling([asked("text")])
    assert len(lm.generate_until([asked("one", dict(max_gen_toks=4))])) == 1


def test_settings_of_tasks():
    told = dict(until="x", max_gen_toks=5, do_sample=False, temperature=0.7)
    assert harness.sampling_of(told) == Sampling(tokens=5, stop=("x",))
    assert harness.sampling_of(dict(do_sample=True, top_p=0.5)) == Sampling(tokens=256, temperature=1.0, top_p=0.5)
    with pytest.raises(ValueError, match="settings num_beams"):
        harness.sampling_of(dict(num_beams=3))
