"""Texts that are compared: figures of the field's libraries, Chinese by its characters, runs that write."""

import json
from pathlib import Path

import pytest

from jaxlm.commands import cli
from jaxlm.evaluation import text_metrics

EN = ["the cat sat on the mat in the hall", "two dogs run"], ["the cat sat on a mat in the hall", "two dogs ran"]
ZH = ["北京是中国的首都", "今天天气很好"], ["北京是中国的首都", "今天天气不好"]


def whole(found: text_metrics.Scored) -> dict[str, float]:
    return {k: float(v[0]) for k, v in found.sample.figures(found.sample.counts_NM.sum(0)[None]).items()}


def test_translations(caplog):
    sacrebleu = pytest.importorskip("sacrebleu")
    found = text_metrics.bleu(*EN)
    assert found.figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(EN[1], [EN[0]]).score)
    assert found.figures["chrf"] == pytest.approx(sacrebleu.corpus_chrf(EN[1], [EN[0]]).score)
    assert "tok:13a|smooth:exp|version:" in found.about and whole(found)["bleu"] == pytest.approx(found.figures["bleu"])
    assert not caplog.records, "the library warns of scores of single sentences, which these are not"
    assert text_metrics.bleu(EN[0], EN[0]).figures == pytest.approx(dict(bleu=100, chrf=100))
    chinese = text_metrics.bleu(*ZH)
    assert "tok:zh" in chinese.about and 60 < chinese.figures["bleu"] < 90
    assert "tok:char" in text_metrics.bleu(["これはペンです"], ["これは本です"]).about


def test_summaries():
    pytest.importorskip("rouge_score")
    found = text_metrics.rouge(["Two dogs run.\nIt rains."], ["Two dogs running. It rained."])
    assert found.figures == pytest.approx(dict(rouge1=1, rouge2=1, rougeL=1, rougeLsum=1)), "words are stemmed"
    assert text_metrics.rouge(*EN).figures["rouge2"] == pytest.approx((6 / 8 + 1 / 2) / 2)
    chinese = text_metrics.rouge(*ZH)
    assert chinese.figures["rouge1"] == pytest.approx((1 + 5 / 6) / 2) and "characters" in chinese.about
    assert whole(chinese)["rougeL"] == pytest.approx(chinese.figures["rougeL"])


def test_a_name_in_another_script_changes_nothing():
    assert text_metrics.script(["The film 霸王别姬 was shown in Cannes, where it won."]) == "latin"
    assert text_metrics.script(["Dostoevsky (Достоевский) wrote the novel in Saint Petersburg."]) == "latin"


SCRIPTS = {
    "ru": ("Кошка сидит на ковре в зале", "Кошка лежит на ковре в зале", 6),
    "ar": ("جلست القطة على السجادة في القاعة", "نامت القطة على السجادة في القاعة", 6),
    "ko": ("고양이가 거실의 깔개 위에 앉아 있다", "고양이가 거실의 깔개 위에 누워 있다", 6),
    "hi": ("बिल्ली हॉल में चटाई पर बैठी है", "बिल्ली हॉल में चटाई पर सोती है", 7),
    "el": ("Η γάτα κάθεται στο χαλί", "Η γάτα κοιμάται στο χαλί", 5),
    "he": ("החתול ישב על השטיח באולם", "החתול שכב על השטיח באולם", 5),
    "th": ("แมวนั่งบนเสื่อ", "แมวนอนบนเสื่อ", None),
    "km": ("ឆ្មាអង្គុយលើកន្ទេល", "ឆ្មាដេកលើកន្ទេល", None),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_texts_of_any_script_are_compared_by_its_words(name):
    pytest.importorskip("rouge_score")
    true, other, words = SCRIPTS[name]
    same = text_metrics.rouge([true], [true])
    assert same.figures == pytest.approx(dict(rouge1=1, rouge2=1, rougeL=1, rougeLsum=1))
    found = text_metrics.rouge([true], [other]).figures
    if words:
        assert found["rouge1"] == pytest.approx((words - 1) / words), "one word of them is another"
        assert "words of any script" in same.about
    else:
        assert 0.5 < found["rouge1"] < 1 and "characters" in same.about
    mixed = text_metrics.rouge([true, *EN[0]], [true, *EN[1]]).figures
    assert 3 * mixed["rouge2"] == pytest.approx(1 + 2 * text_metrics.rouge(*EN).figures["rouge2"]), "each by its own"
    pytest.importorskip("sacrebleu")
    assert text_metrics.bleu([true] * 2, [true] * 2).figures == pytest.approx(dict(bleu=100, chrf=100))


def test_answers():
    assert text_metrics.exact(["a b", "c"], [" a  b\n", "C"]).figures == dict(exact=0.5)
    true = ["so 3 and 4 make #### 1,007", "#### 5", "none"]
    assert text_metrics.number(true, ["it is 1007.", "5 apples for $6", "none"]).figures["number"] == pytest.approx(
        1 / 3
    )


SEQ2SEQ = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import t5
from jaxlm.objectives import seq2seq

def config():
    return Run("pairs", t5.Config(vocab=264, layers=1, width=32, heads=2, head_width=16, ffn=64, decoder_start=None),
               seq2seq.Config(source="en", target="de"), data=Data(train=({many!r},), valid=({file!r},),
               tokenizer="bytes", cache={out!r}), optim=Optim(lr=2e-2, warmup=1), execution=Execution("float32"),
               train=Train(steps=60, batch_size=16, seq_len=16, prompts=()), out={out!r})
"""
SFT = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import sft

def config():
    return Run("chats", llama.Config(vocab=264, layers=1, width=32, heads=2, kv_heads=2, head_width=16, ffn=64,
               positions=64), sft.Config(pack=False), data=Data(train=({many!r},), valid=({file!r},),
               tokenizer="bytes"), optim=Optim(lr=2e-2, warmup=1), execution=Execution("float32"),
               train=Train(steps=60, batch_size=8, seq_len=48, prompts=()), out={out!r})
"""


@pytest.mark.usefixtures("one_device")
def test_pairs_are_written_and_compared(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sacrebleu")
    monkeypatch.chdir(tmp_path)
    for end, lines in (("en", "one\ntwo\na long line to cut\n"), ("de", "eins\nzwei\ndrei\n")):
        Path(f"p.{end}").write_text(lines)
        Path(f"many.{end}").write_text(lines * 40)  # few records are slow to shuffle
    Path("c.py").write_text(SEQ2SEQ.format(many="many", file="p", out="runs"))
    assert cli.main(["train", "c.py"]) == 0
    capsys.readouterr()
    args = ["eval", "runs/pairs", "--metric", "bleu", "--tokens", "8"]
    assert cli.main([*args, "--data", "p", "--json"]) == 0
    out, shown = capsys.readouterr()
    found = json.loads(out)
    assert found["figures"]["chrf"] == 100 and found["sizes"] == {"texts": "3 texts"} and "tok:13a" in shown
    assert "p: 1 of 3 sources lose their end; raise train.seq_len" in shown
    rows = [json.loads(line) for line in Path("evals/pairs/texts.jsonl").read_text().splitlines()]
    assert rows == [dict(true=t, found=t) for t in ("eins", "zwei", "drei")]
    args[3] = "exact"
    assert cli.main([*args, "--limit", "2", "--beams", "2", "--against", "runs/pairs", "--resamples", "100"]) == 0
    assert "texts: the same 2 examples, 100 paired resamples" in capsys.readouterr().out
    args[3] = "blue"
    assert cli.main(args) == 2
    assert "--metric: unknown 'blue'; did you mean 'bleu'?" in capsys.readouterr().err


def test_a_decoder_that_learned_pairs_writes_behind_the_source(tmp_path):
    from jaxlm.assembly.run_objective import bind
    from jaxlm.data.tokenizer import Bytes
    from jaxlm.objectives import seq2seq
    from jaxlm.objectives.objective import RowShape

    (tmp_path / "a.jsonl").write_text(json.dumps(dict(source="a long text", target="t")))
    tokens = Bytes()
    task = bind(seq2seq.Config(), tokens, RowShape(12))
    read, sources, true, notes = task.read_prompts(str(tmp_path / "a.jsonl"), 4, task.prompts)
    assert read == [[tokens.bos_id, *b"a long", tokens.sep_id]] and sources is None and true == ["t"]
    assert "1 of 1 sources lose their end" in notes[0]
    with pytest.raises(ValueError, match=r"tokens: 10 leave nothing of train\.seq_len 12"):
        task.read_prompts(str(tmp_path / "a.jsonl"), 10, task.prompts)


@pytest.mark.usefixtures("one_device")
def test_conversations_are_gone_on_with_and_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [dict(question="2+2?", answer="2+2=4"), dict(question="1+2?", answer="it is 3")]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("many.jsonl").write_text("\n".join(map(json.dumps, rows * 60)))
    Path("c.py").write_text(SFT.format(many="many.jsonl", file="a.jsonl", out="runs"))
    assert cli.main(["train", "c.py"]) == 0
    capsys.readouterr()
    args = ["eval", "runs/chats", "--metric", "number", "--json"]
    assert cli.main([*args, "--tokens", "12"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["figures"] == {"number": 1}
    assert cli.main([*args, "--tokens", "48"]) == 2
    assert "--tokens: 48 leave nothing of train.seq_len 48 to read" in capsys.readouterr().err
    assert cli.main([*args, "--tokens", "46"]) == 0
    assert "2 of 2 conversations lose their beginning" in capsys.readouterr().err
