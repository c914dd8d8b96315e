"""Whoever reads a file that holds nothing says so by the file's name, and with status 2."""

import gzip
import json
from pathlib import Path

import pytest

from jaxlm.commands import cli

CONFIG = """
from jaxlm import Data, Run, Train
from jaxlm.models import bert, llama, t5
from jaxlm.objectives import {objective} as objective

MODELS = dict(
    bert=bert.Config(vocab=264, layers=1, width=16, heads=2, ffn=32, positions=64),
    llama=llama.Config(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16),
    t5=t5.Config(vocab=264, layers=1, width=16, heads=2, head_width=8, ffn=16),
)


def config():
    return Run("r", MODELS["{model}"], objective.Config({settings}), out="runs", train=Train(steps=1, seq_len=64),
               data=Data(train=("x",), tokenizer="bytes", cache="cache", tokenize_workers=1))
"""
LABELS = "labels=('a', 'b')"
HEADS = {".csv": "text,label\n", ".tsv": "text\tlabel\n", ".json": "[]", ".jsonl": "\n\n", ".txt": "\n\n"}
READERS = [
    ("classify", "bert", "", (".csv", ".tsv", ".jsonl", ".json")),
    ("classify", "bert", LABELS, (".csv",)),
    ("relate", "bert", "", (".csv", ".tsv", ".jsonl", ".json", ".txt")),
    ("tag", "bert", "", (".txt", ".conll")),
    ("choice", "bert", "", (".csv", ".jsonl", ".json")),
    ("answer", "bert", "", (".json", ".jsonl")),
    ("sft", "llama", "", (".json", ".jsonl")),
    ("preference", "llama", "", (".json", ".jsonl")),
    ("causal", "llama", "", (".jsonl", ".jsonl.gz")),
    ("seq2seq", "t5", "", (".jsonl",)),
]


def says(arguments: list[str], name: str, capsys) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert name in shown and shown.count("\n") == 1 and "--data source" not in shown, shown


@pytest.mark.parametrize(("objective", "model", "settings", "endings"), READERS)
def test_readers_name_the_file_that_is_empty(objective, model, settings, endings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(CONFIG.format(objective=objective, model=model, settings=settings))
    for ending in endings:
        for name, text in (("nothing", ""), ("head", HEADS.get(ending, "\n\n"))):
            file = Path(f"{name}{ending}")
            file.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
            says(["data", "prepare", "c.py", "--data.train", str(file), "--data.valid", str(file)], str(file), capsys)


def test_a_part_that_is_empty_is_named_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(CONFIG.format(objective="classify", model="bert", settings=""))
    Path("good.csv").write_text("text,label\na,x\nb,y\nc,x\nd,y\n")
    Path("head.csv").write_text(HEADS[".csv"])
    for part in ("valid", "test"):
        parts = {"valid": "good.csv"} | {part: "head.csv"}
        options = [word for name, file in parts.items() for word in (f"--data.{name}", file)]
        says(["data", "prepare", "c.py", "--data.train", "good.csv", *options], "head.csv", capsys)


def test_so_do_commands_that_read_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {"nothing.txt": "", "blank.jsonl": json.dumps({"text": ""}), "few.csv": HEADS[".csv"]}.items():
        Path(name).write_text(text)
    for name in ("nothing.txt", "blank.jsonl", "few.csv"):
        says(["tokenizer", "train", name, "--out", "x.model"], name, capsys)
    says(["embed", "nowhere", "--file", "nothing.txt"], "--file: nothing.txt holds no text", capsys)
    says(["augment", "few.csv", "--method", "mask", "--model", "nowhere", "--out", "more.csv"], "few.csv", capsys)
    Path("c.py").write_text(CONFIG.format(objective="classify", model="bert", settings=LABELS))
    words = ["data", "prepare", "c.py", "--data.train", "few.csv", "--data.tokenizer", "sentencepiece:300"]
    says(words, "few.csv", capsys)
