"""A model by its place: every format of it says and does the same, and what is broken is refused."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from support.tiny_models import random_weights

from jaxlm.assembly import convert, generate_text, model_source, open_model, run_directory
from jaxlm.commands import cli
from jaxlm.core import config, spec
from jaxlm.data.tokenizer import Bytes, load
from jaxlm.formats import huggingface
from jaxlm.formats.hf_sidecars import Generation
from jaxlm.inference.sampling import Sampling
from jaxlm.models import MODELS
from jaxlm.nn import layout

SHAPES = {
    "llama": dict(vocab=264, layers=2, width=32, heads=4, kv_heads=2, head_width=8, ffn=48, positions=64),
    "bert": dict(vocab=264, layers=1, width=16, heads=2, ffn=32, positions=64),
    "t5": dict(vocab=264, layers=1, width=16, heads=2, head_width=8, ffn=32),
}


def published(folder: Path, name: str, seed: int = 0, **more) -> Path:
    """A tiny Hugging Face directory whose tokenizer is bytes."""
    family = MODELS[name]
    c = family.Config(**SHAPES[name] | more)
    specs = family.specs(c)
    tokens = folder.parent / "bytes"
    Bytes().save(tokens)
    weights = jax.device_put(random_weights(specs, seed))
    huggingface.save(folder, family, c, specs, weights, dtype="float32", extra_files_from=tokens, card=False)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("models") / "llama", "llama")


def said(capsys) -> str:
    return capsys.readouterr().out


def complaint(capsys, *args: str) -> str:
    """The one line of a command that ends with status 2."""
    assert cli.main([str(a) for a in args]) == 2
    line = capsys.readouterr().err
    assert line.startswith("jaxlm: ") and line.count("\n") == 1 and "Traceback" not in line
    return line


# ------------------------------------------------------------------------------------------------ from format to format


def test_every_format_of_a_model_says_the_same(llama, tmp_path, capsys):
    pytest.importorskip("gguf")

    def text(place) -> str:
        assert cli.main(["generate", str(place), "--prompt", "ab", "--tokens", "8", "--json"]) == 0
        return json.loads(said(capsys).splitlines()[-1])["texts"][0]

    expected = text(llama)
    assert cli.main(["import", str(llama), str(tmp_path / "run")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "back"), "--json"]) == 0
    assert json.loads(said(capsys).splitlines()[-1])["max_abs_difference"] == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (llama / name).read_bytes()
    assert [text(tmp_path / name) for name in ("run", "back")] == [expected] * 2
    one = generate_text.generate(str(tmp_path / "run"), ["ab"], Sampling(tokens=8))[0][0]
    assert one.text == expected
    assert "give a directory instead" in complaint(capsys, "generate", "hf:not a/name/at all", "--prompt", "a")


def test_gguf_in_and_out(tmp_path, capsys):
    """With a SentencePiece vocabulary, which the format can hold."""
    pytest.importorskip("gguf")
    from jaxlm.data.train_tokenizer import train_sentencepiece

    texts = [f"the {a} {b} of {c}" for a in ("cat", "dog", "sun") for b in ("sat", "ran") for c in map(str, range(40))]
    made = train_sentencepiece(texts, tmp_path / "words" / "tokenizer.model", vocab_size=300)
    family = MODELS["llama"]
    c = family.Config(**SHAPES["llama"] | dict(vocab=304, width=64, ffn=64))
    weights = spec.init(family.specs(c), jax.random.key(1))
    huggingface.save(tmp_path / "hf", family, c, family.specs(c), weights, dtype="float16",
            extra_files_from=tmp_path / "words", card=False)  # fmt: skip
    for kind in ("f16", "q8_0"):
        file = tmp_path / f"{kind}.gguf"
        how = ["--quantize", kind] if kind == "q8_0" else []
        assert cli.main(["export", str(tmp_path / "hf"), str(file), "--format", "gguf", *how]) == 0
        assert json.loads(file.with_name(f"{kind}.gguf.json").read_text())["relative_difference"] < 0.05
    assert cli.main(["export", str(tmp_path / "f16.gguf"), str(tmp_path / "back"), "--dtype", "float16"]) == 0
    assert np.array_equal(*(convert.logits(open_model.open_model(tmp_path / n)) for n in ("hf", "back")))
    for name in ("hf", "back", "f16.gguf"):
        opened = open_model.open_model(tmp_path / name)
        assert opened.prompts(["the cat"]) == ([[made.bos_id, *made.encode("the cat")]], None)
        assert opened.eos == [made.eos_id]
    text, few = tmp_path / "text.txt", tmp_path / "q4_k_m.gguf"
    text.write_text("\n".join(texts))
    how = ["--format", "gguf", "--quantize", "q4_k_m"]
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "hf"), str(few), *how, "--calibration", str(text)]) == 0
    lines = capsys.readouterr().out
    assert "note: rows of 64 don't fit Q4_K: " in lines and " got Q5_0, as llama.cpp does it" in lines
    measured = tmp_path / "q4_k_m.imatrix.gguf"
    again = tmp_path / "again.gguf"
    assert cli.main(["export", str(tmp_path / "hf"), str(again), *how, "--calibration", str(measured)]) == 0
    assert np.allclose(*(convert.logits(open_model.open_model(file)) for file in (few, again)), atol=1e-4)
    capsys.readouterr()
    assert "name a file that ends in .gguf" in complaint(capsys, "export", tmp_path / "hf", tmp_path / "x",
                                                         "--format", "gguf")  # fmt: skip


def test_programs_without_this_package(llama, tmp_path, capsys):
    pytest.importorskip("flatbuffers")
    assert cli.main(["export", str(llama), str(tmp_path / "programs"), "--format", "stablehlo"]) == 0
    assert (tmp_path / "programs" / "export.json").is_file()
    assert "same likeliest token at 100.0%" in said(capsys)


def test_an_export_that_is_another_model_is_removed(llama, tmp_path, capsys, monkeypatch):
    real = huggingface.shards.collect
    monkeypatch.setattr(
        huggingface.shards, "collect", lambda tensor, flat, dtype: real(tensor, flat, dtype)[::-1].copy()
    )
    line = complaint(capsys, "export", llama, tmp_path / "out")
    assert "gives other logits" in line and not (tmp_path / "out").exists()


def test_nothing_is_written_over(llama, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for command in ("import", "export"):
        assert "is there already" in complaint(capsys, command, llama, tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "mine"
    assert "unknown 'hff'; did you mean 'hf'?" in complaint(capsys, "export", llama, tmp_path / "x", "--format", "hff")
    assert "'q8_0' is not for hf" in complaint(capsys, "export", llama, tmp_path / "x", "--dtype", "q8_0")


# ----------------------------------------------------------------------------------------------------------------- use


def test_evaluation_of_published_files(llama, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    assert cli.main(["eval", str(llama), "--data", str(tmp_path / "text.txt"), "--batches", "1", "--json"]) == 0
    found = json.loads(said(capsys).splitlines()[-1])
    assert 0 < found["bits_per_byte"] < 60 and found["targets"] > 100
    assert "has no validation data of its own; name some with --data" in complaint(capsys, "eval", llama)


def test_embeddings_of_published_files(tmp_path, capsys):
    folder = published(tmp_path / "bert", "bert", head=False)
    out = tmp_path / "v.npy"
    assert cli.main(["embed", str(folder), "--text", "one", "--text", "two two", "--out", str(out)]) == 0
    vectors = np.load(out)
    assert vectors.shape == (2, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    capsys.readouterr()
    (tmp_path / "t.txt").write_text("some text")
    assert "jaxlm embed" in complaint(capsys, "eval", folder, "--data", tmp_path / "t.txt")
    assert "does not predict the next token" in complaint(capsys, "generate", folder, "--prompt", "a")


def test_an_encoder_decoder_reads_the_text_and_begins_as_its_files_say(tmp_path):
    folder = published(tmp_path / "t5", "t5", decoder_start=7)
    p = open_model.open_model(folder)
    ids, source = p.prompts(["ab", "c"])
    assert ids == [[7], [7]] and source == [[97, 98, p.tokens.eos_id], [99, p.tokens.eos_id]]
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 9}))
    assert open_model.open_model(folder).prompts(["a"])[0] == [[9]]
    answers = generate_text.generate(str(folder), ["ab"], Sampling(tokens=4))
    assert len(answers[0][0].completion.tokens) <= 4


def test_tokens_beyond_the_vocabulary_are_never_chosen(tmp_path):
    folder = published(tmp_path / "padded", "llama", vocab=4096)
    answers = generate_text.generate(str(folder), ["a", "bc"], Sampling(tokens=16, temperature=5.0, samples=4))
    chosen = [t for several in answers for a in several for t in a.completion.tokens]
    assert len(chosen) > 50 and max(chosen) < Bytes.vocab_size


@pytest.mark.parametrize(("told", "before"), [(True, [258]), (False, []), (None, [])])
def test_a_begin_of_text_token_that_only_the_settings_ask_for(tmp_path, told, before):
    folder = published(tmp_path / "m", "llama")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": told}
    path.write_text(json.dumps(settings))
    found = load(folder)
    assert found.boundary_ids == (before, []) and found.encode("a") == [97]
    found.save(tmp_path / "again")
    assert load(tmp_path / "again").boundary_ids == (before, [])
    assert open_model.open_model(folder).prompts(["a"])[0] == [[*before, 97]]


def test_a_prefix_model_reads_its_prompt_both_ways(tmp_path):
    from jaxlm.objectives import causal, prefix

    made = {}
    for objective in (causal, prefix):
        run = config.Run("r", MODELS["llama"].Config(**SHAPES["llama"]), objective.Config(),
                         data=config.Data(tokenizer="bytes"), execution=config.Execution("float32"))  # fmt: skip
        specs = MODELS["llama"].specs(run.model)
        source = model_source.Source(tmp_path, "run", MODELS["llama"], run.model, Bytes(), Generation(), {},
                                   ([], []), run=run)  # fmt: skip
        model = open_model.Model(MODELS["llama"], run.model, specs, layout.Layout(execution=run.execution))
        weights = random_weights(specs)
        generate = open_model.Pretrained(source, model, weights, None).generator()
        batch = generate.batch([[5, 6, 7]], Sampling(tokens=4))
        forward = jax.jit(lambda weights, batch, model=model: model.forward(weights, batch).x_BTD)
        x_BTD = forward(weights, batch)
        moved = forward(weights, batch | {"tokens": np.where(batch["tokens"] == 7, 9, batch["tokens"])})
        made[objective] = float(np.abs(x_BTD - moved)[0, -3].max())  # of the first token, when the last one changes
    assert made[causal] == 0 and made[prefix] > 1e-3


# ------------------------------------------------------------------------------------------------------ what is broken


def edited(llama: Path, tmp_path: Path, name: str = "config.json", **values) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps(content | values))
    return folder


def rewritten(llama: Path, tmp_path: Path, change) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_not_whole(llama, tmp_path, capsys):
    folder = edited(llama, tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "model.safetensors" in complaint(capsys, "generate", folder, "--prompt", "a")
    file.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    assert "model.safetensors" in complaint(capsys, "generate", folder, "--prompt", "a")
    file.write_bytes(whole[:8] + b"{" * 20 + whole[28:])
    assert "model.safetensors" in complaint(capsys, "export", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit(llama, tmp_path, capsys):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = rewritten(llama, tmp_path / "a", lambda t: t.pop(name))
    assert f"1 tensor is missing ({name})" in complaint(capsys, "generate", folder, "--prompt", "a")
    folder = rewritten(llama, tmp_path / "b", lambda t: t.update(extra=np.ones(3, np.float32)))
    assert "1 tensor is not this model's (extra)" in complaint(capsys, "generate", folder, "--prompt", "a")
    folder = rewritten(llama, tmp_path / "c", lambda t: t.update({name: np.ones((5, 5), np.float32)}))
    line = complaint(capsys, "generate", folder, "--prompt", "a")
    assert f"{name} is [5, 5], but config.json makes it [48, 32]" in line


def test_architectures_that_are_not_known(llama, tmp_path, capsys):
    line = complaint(capsys, "generate", edited(llama, tmp_path, model_type="lama"), "--prompt", "a")
    assert "model_type 'lama' is not read here; did you mean 'llama', known: " in line and "gpt2" in line
    assert "own code (auto_map) is never run" in complaint(
        capsys, "generate", edited(llama, tmp_path / "b", model_type="mine", auto_map={"AutoModel": "x.y"}), "--prompt",
        "a",
    )  # fmt: skip


def test_pickles_are_never_opened(llama, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = edited(llama, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    line = complaint(capsys, "generate", folder, "--prompt", "a")
    assert "pytorch_model.bin, a pickle" in line and "save_pretrained" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_must_stay_in_its_folder(llama, tmp_path, capsys, where):
    folder = edited(llama, tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, where)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert where in complaint(capsys, "generate", folder, "--prompt", "a")


def test_a_hostile_chat_template_gets_nowhere(llama, tmp_path, capsys, monkeypatch):
    pytest.importorskip("jinja2")
    folder = edited(llama, tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__[1].__subclasses__()[0]('touch " + str(tmp_path / "ran") + "') }}"
    )
    monkeypatch.setattr("sys.stdin", iter(["hello\n"]))
    monkeypatch.setattr("sys.stdin", type("Lines", (), {"readline": iter(["hello\n", ""]).__next__,
                                                        "isatty": lambda self: False})())  # fmt: skip
    cli.main(["chat", str(folder), "--tokens", "4"])
    out = capsys.readouterr()
    assert "template" in out.out + out.err
    assert not (tmp_path / "ran").exists()


def test_what_is_no_model(tmp_path, capsys):
    assert "no such model; give a run directory" in complaint(capsys, "generate", tmp_path / "none", "--prompt", "a")
    assert "or hf:someone/model for one on the hub" in complaint(capsys, "generate", "someone/model", "--prompt", "a")
    (tmp_path / "x.gguf").write_bytes(b"not one")
    assert "x.gguf" in complaint(capsys, "generate", tmp_path / "x.gguf", "--prompt", "a")
    (tmp_path / "empty").mkdir()
    assert "config.json" in complaint(capsys, "generate", tmp_path / "empty", "--prompt", "a")


# ------------------------------------------------------------------------------------------- training from a model on

CONFIG = """
from jaxlm import Data, Execution, Optim, Run, Train
from jaxlm.models import gpt2
from jaxlm.objectives import {objective}

def config():
    return Run("r", gpt2.Config(), {objective}.Config(), out={out!r},
               data=Data(train=({text!r},), cache={out!r} + "/cache", holdout=0.2), optim=Optim(warmup=1),
               train=Train(steps=2, batch_size=8, seq_len=16, prompts=(), save_every=1),
               execution=Execution("float32", scan=True))
"""


def config_file(tmp_path: Path, objective: str) -> str:
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the {i} quick brown foxes jump over {i * i} lazy dogs\n" * 5)
    file = tmp_path / "c.py"
    file.write_text(CONFIG.format(objective=objective, out=str(tmp_path), text=str(tmp_path / "text")))
    return str(file)


@pytest.mark.usefixtures("one_device")
def test_training_starts_from_a_published_model(llama, tmp_path, capsys):
    """Whatever architecture the config file had; and a run can be where another starts."""
    file = config_file(tmp_path, "causal")
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    try:
        assert cli.main(["train", file, "--start", str(llama), "--optim.lr", "0", "--model.dropout", "0.1"]) == 0
    finally:
        (llama / "chat_template.jinja").unlink()
    run = tmp_path / "r"
    before, after = open_model.open_model(llama), open_model.open_model(run)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert after.model.config.dropout == 0.1 and after.source.templates == {"default": "{{ messages }}"}
    assert after.prompts(["a"])[0] == [[258, 97]]  # as it was trained here
    assert cli.main(["train", file, "--start", str(run), "--name", "more"]) == 0
    moved = open_model.open_model(tmp_path / "more").params
    assert float(np.abs(moved["head"] - before.params["head"]).max()) > 0
    capsys.readouterr()
    assert "no such model" in complaint(capsys, "train", file, "--start", tmp_path / "none", "--name", "x")


@pytest.mark.usefixtures("one_device")
def test_a_run_reads_the_model_that_it_starts_from_once(llama, tmp_path, monkeypatch):
    """And a run that is continued doesn't read it at all."""
    described, real = [], model_source.describe

    def count(place):
        described.append(str(place))
        return real(place)

    monkeypatch.setattr(model_source, "describe", count)
    monkeypatch.setattr(open_model, "describe", count)
    file, model = config_file(tmp_path, "causal"), tmp_path / "model"
    shutil.copytree(llama, model)
    same = ["--optim.lr", "0", "--model.dropout", "0.1"]  # as another test, whose compiled step then serves here
    assert cli.main(["train", file, "--start", str(model), *same]) == 0
    assert described == [str(model)]
    shutil.rmtree(model)
    log = tmp_path / "r" / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines(keepends=True) if '"end"' not in line]
    log.write_text("".join(lines))  # its end was cut off
    assert cli.main(["train", str(tmp_path / "r")]) == 0
    assert described == [str(model)]


@pytest.mark.usefixtures("one_device")
def test_heads_that_the_model_lacks_are_fresh(tmp_path, capsys):
    folder = published(tmp_path / "bert", "bert", next_sentence=False)
    file = config_file(tmp_path, "next_sentence")
    assert cli.main(["train", file, "--start", str(folder), "--optim.lr", "0"]) == 0
    opened, start = open_model.open_model(tmp_path / "r"), open_model.open_model(folder)
    assert float(np.abs(opened.params["next_sentence"]).max()) > 0
    np.testing.assert_array_equal(opened.params["blocks"]["q"], start.params["blocks"]["q"])
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "r"), str(tmp_path / "whole")]) == 0
    assert "BertForPreTraining" in (tmp_path / "whole" / "config.json").read_text()

    # A run of version 0.1.0 has no word on the order of the head's outputs, and "is next" at 1 where files have 0.
    settings = json.loads((tmp_path / "r" / "config.json").read_text())
    assert settings["objective"].pop("next_label") == 0
    (tmp_path / "r" / "config.json").write_text(json.dumps(settings))
    assert run_directory.read_config(tmp_path / "r").objective.next_label == 1
    old = open_model.open_model(tmp_path / "r")
    assert old.source.run.objective.next_label == 0
    for name in ("next_sentence", "next_sentence_bias"):
        np.testing.assert_array_equal(old.params[name], opened.params[name][..., ::-1])
