"""New examples keep their labels, their format and what must not change; the words are the model's."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from support.tiny_models import published
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxlm.assembly import augment
from jaxlm.assembly.augment import Item
from jaxlm.assembly.open_model import open_model
from jaxlm.commands import cli
from jaxlm.core import spec
from jaxlm.formats import huggingface
from jaxlm.models import MODELS

WORDS = ["the", "film", "was", "good", "bad", "dull", "fine", "great", "Paris", "plot", "is", "a", "Anna", "saw"]
TSV = "sentence\tlabel\nThe film was good.\tpos\nthe plot is dull, a bad plot\tneg\n12 34\tneg\n"
CONLL = """-DOCSTART- -X- O

Anna NNP B-PER
saw VB O
the DT O
film NN O

Paris NNP B-LOC
London NNP I-LOC
. . O

"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "##s", "12", *WORDS])}
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.NFC(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    (folder / "text").mkdir()
    inner.save(str(folder / "text" / "tokenizer.json"))
    family = MODELS["bert"]
    c = family.Config(vocab=len(vocab), layers=1, width=16, heads=2, ffn=32, positions=32)
    specs = family.specs(c)
    weights = jax.tree.map(lambda w: w * 3, spec.init(specs, jax.random.key(0)))
    huggingface.save(
        folder / "m", family, c, specs, weights, dtype="float32", extra_files_from=folder / "text", card=False
    )
    return folder / "m"


def complaint(capsys, *args) -> str:
    assert cli.main(["augment", *map(str, args)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("jaxlm: ") and line.count("\n") == 1
    return line


def test_words_of_a_table_change_and_labels_do_not(bert, tmp_path, capsys):
    old, new = tmp_path / "a.tsv", tmp_path / "b.tsv"
    old.write_text(TSV)
    args = ["augment", str(old), "--method", "mask", "--model", str(bert), "--text", "sentence", "--share", "0.4"]
    assert cli.main([*args, "--copies", "2", "--out", str(new)]) == 0
    assert "4 new of 3 examples" in capsys.readouterr().out  # the third has no word
    head, *rows = [line.split("\t") for line in new.read_text().splitlines()]
    assert head == ["sentence", "label"] and [label for _, label in rows] == ["pos", "neg"] * 2
    for text, label in rows:
        was = {"pos": "The film was good.", "neg": "the plot is dull, a bad plot"}[label]
        a, b = (augment.WORD.findall(t) for t in (was, text))
        assert len(a) == len(b) and augment.WORD.sub("", was) == augment.WORD.sub("", text)
        assert sum(x != y for x, y in zip(a, b, strict=True)) == {4: 2, 7: 3}[len(a)]
        assert {w.casefold() for w in b} <= {w.casefold() for w in WORDS} and b[0][0].isupper() >= a[0][0].isupper()
    again = tmp_path / "c.tsv"
    assert cli.main([*args, "--copies", "2", "--out", str(again)]) == 0 and again.read_text() == new.read_text()
    assert cli.main([*args, "--copies", "2", "--out", str(tmp_path / "d.tsv"), "--seed", "1"]) == 0
    assert (tmp_path / "d.tsv").read_text() != new.read_text()


def test_the_likeliest_word_is_the_models(bert):
    p = open_model(bert)

    @jax.jit
    def all_logits(weights, batch):
        r = p.model.readout(weights, p.model.forward(weights, batch).x_BTD)
        return augment.losses.logits(r, p.model.shard)

    items = [Item("the film was good", [(4, 8)]), Item("a plot", [(2, 6)])]
    made, said = augment._masked(p, items, 1.0, 1, 1, 0)
    assert said.startswith("2 of their 2 words")
    for item, [[before], [after]] in zip(made, ([["the"], ["was good"]], [["a"], [""]]), strict=True):
        ids = [2, *p.tokens.encode(before), 4, *p.tokens.encode(after), 3]
        batch = dict(tokens=np.array([ids]), positions=np.arange(len(ids))[None])
        z_V = np.asarray(all_logits(p.params, batch))[0, ids.index(4)]
        best = [i for i in np.argsort(-z_V) if i >= 9 and p.tokens.piece(int(i)) != item.text[slice(*item.masked[0])]]
        assert item.new == [p.tokens.piece(int(best[0]))]


def test_only_whole_words_are_written(bert):
    tokens = open_model(bert).tokens
    found = [tokens.piece(i) for i in np.flatnonzero(augment.whole_words(tokens, tokens.vocab_size))]
    assert found == WORDS


@pytest.mark.parametrize("entities", [False, True])
def test_words_of_entities_stay_unless_asked(bert, tmp_path, entities):
    old, new = tmp_path / "a.txt", tmp_path / "b.txt"
    old.write_text(CONLL)
    args = ["augment", str(old), "--method", "mask", "--model", str(bert), "--share", "1", "--out", str(new)]
    assert cli.main([*args, *(["--entities"] if entities else [])]) == 0
    a, b = ([line.split(" ") for line in text.splitlines()] for text in (CONLL, new.read_text()))
    a = a[2:] if entities else a[2:6]  # a sentence without a word to replace is left out
    assert [row[1:] for row in a if row != [""]] == [row[1:] for row in b if row != [""]]
    for (was, *_, tag), (word, *_) in zip([r for r in a if r != [""]], [r for r in b if r != [""]], strict=True):
        assert (word == was) == (was == "." or (tag != "O" and not entities))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_other_formats(bert, tmp_path, suffix):
    old, new = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    row = dict(id="7", text='the film, "good"', more="a, b")
    if suffix == ".csv":
        with open(old, "w", newline="") as file:
            csv.writer(file).writerows([list(row), row.values()])
    else:
        old.write_text(json.dumps(row | {"more": ["ü", 1]}, ensure_ascii=False))
    augment.augment(str(old), new, "mask", str(bert))
    if suffix == ".csv":
        [found] = csv.DictReader(new.read_text().splitlines())
        assert found["more"] == "a, b"
    else:
        found = json.loads(new.read_text())
        assert found["more"] == ["ü", 1] and "ü" in new.read_text()
    assert found["id"] == "7" and found["text"] != row["text"] and found["text"].endswith('"') and "," in found["text"]


def test_there_and_back(tmp_path, capsys):
    t5, old, new = published(tmp_path / "t5", "t5"), tmp_path / "a.tsv", tmp_path / "b.tsv"
    old.write_text(TSV)
    args = [old, "--method", "back_translate", "--model", t5, "--text", "sentence", "--out", new]
    assert "needs --back" in complaint(capsys, *args)
    more = ["--back", str(t5), "--tokens", "12", "--temperature", "2"]
    assert cli.main(["augment", *map(str, args), *more]) == 0
    said = capsys.readouterr().out
    _, *rows = [line.split("\t") for line in new.read_text().splitlines()]
    assert 1 <= len(rows) <= 3 and {label for _, label in rows} <= {"pos", "neg"} and f"{len(rows)} new of 3" in said
    assert not {text for text, _ in rows} & {line.split("\t")[0] for line in TSV.splitlines()}
    old = tmp_path / "a.txt"
    old.write_text(CONLL)
    assert "lose the tags" in complaint(capsys, old, *args[1:-1], tmp_path / "c.txt", *more)


def test_bad_requests_get_one_line(bert, tmp_path, capsys):
    old = tmp_path / "a.tsv"
    old.write_text(TSV)
    args = ["--method", "mask", "--model", bert, "--text", "sentence"]
    assert "never overwritten" in complaint(capsys, old, *args, "--out", old)
    assert "name it *.tsv" in complaint(capsys, old, *args, "--out", tmp_path / "b.csv")
    assert "does not exist" in complaint(capsys, tmp_path / "no.tsv", *args, "--out", tmp_path / "b.tsv")
    assert "Set --text to one of them" in complaint(capsys, old, *args[:-1], "words", "--out", tmp_path / "b.tsv")
    assert "--share: 2.0 is out of range" in complaint(capsys, old, *args, "--share", "2", "--out", tmp_path / "b.tsv")
    assert "--top-k: only 14" in complaint(capsys, old, *args, "--top-k", "50", "--out", tmp_path / "b.tsv")
    llama = published(tmp_path / "llama")
    assert "fills no masks" in complaint(
        capsys, old, *args[:2], "--model", llama, *args[4:], "--out", tmp_path / "b.tsv"
    )
    (tmp_path / "n.tsv").write_text("sentence\n12\n")
    assert "nothing new came of" in complaint(capsys, tmp_path / "n.tsv", *args, "--out", tmp_path / "b.tsv")
    assert not (tmp_path / "b.tsv").exists()
