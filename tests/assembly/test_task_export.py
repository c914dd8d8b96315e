"""A fine-tuned model is exported with its head, labels texts from there as before, and is gone on from."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from support import tiny_published
from support.tiny_published import VOCAB

import jaxlm
from jaxlm.assembly import convert, model_source, open_model, run_directory, task_heads
from jaxlm.assembly import program as programs
from jaxlm.assembly.model_source import StartModel
from jaxlm.commands import cli
from jaxlm.core import config_io
from jaxlm.core.config import Data, Execution, Optim, Run, Train
from jaxlm.models import MODELS, bert, gpt2, llama, modernbert, t5
from jaxlm.objectives import answer, choice, classify, tag

SHAPE = dict(vocab=VOCAB, layers=1, width=16, heads=4, ffn=24, positions=32, head=False)
LLAMA = llama.Config(vocab=VOCAB, layers=1, width=16, heads=4, kv_heads=2, head_width=4, ffn=24, positions=32)
MODERN = modernbert.Config(**SHAPE | dict(layers=2), task_transform=True, mean_pooling=True)
LABELS = ("bad", "good", "so")
TEXTS = ["the film was good", "so bad"]


def of_bert(kind: str = "bert", **changes) -> bert.Config:
    return bert.Config(**SHAPE | dict(model_type=kind) | changes)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A published classifier with labels of its own."""
    folder = tmp_path_factory.mktemp("classifier") / "theirs"
    return tiny_published.directory(folder, of_bert(), classify.Config(labels=LABELS, bias=True))


def table(folder: Path, labels: tuple[str, ...]) -> str:
    file = folder / "train.csv"
    lines = [f"the film was {word},{label}" for label in labels for word in ("good", "bad", "so good", "it")]
    file.write_text("\n".join(["text,label", *lines]) + "\n")
    return str(file)


def run(folder: Path, start: Path, data: str, settings=classify.Config(), **changes) -> Run:  # noqa: B008
    made = Run(
        "r", bert.Config(), settings, data=Data(train=(data,), valid=(data,)), optim=Optim(lr=1e-3, warmup=1),
        train=Train(steps=2, batch_size=8, seq_len=16, prompts=()), execution=Execution("float32"), out=str(folder),
    )  # fmt: skip
    return jaxlm.load(made, start=str(start), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_fine_tuned_classifier_is_exported_and_labels_as_before(adapter, one_device, tmp_path):
    """It starts from a masked LM without a pooler, and gets the dense layer that RoBERTa's classifiers have."""
    start = tiny_published.directory(tmp_path / "start", of_bert("roberta", head=True, pooler=False, types=1, offset=1))
    made = run(tmp_path, start, table(tmp_path, LABELS), adapter=adapter)
    assert made.model.pooler and made.objective.bias and made.objective.labels == LABELS
    trained = jaxlm.train(made).open()
    _, record = convert.export(tmp_path / "r", tmp_path / "hf")
    assert record["max_abs_difference"] < 1e-5
    tensors = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    assert {k for k in tensors if not k.startswith("roberta.")} == {
        f"classifier.{name}.{end}" for name in ("dense", "out_proj") for end in ("weight", "bias")
    }
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert about["architectures"] == ["RobertaForSequenceClassification"]
    assert about["id2label"] == {"0": "bad", "1": "good", "2": "so"} and about["label2id"]["so"] == 2
    assert about["problem_type"] == "single_label_classification"
    again = jaxlm.open(tmp_path / "hf")
    for before, after in zip(trained.predict(TEXTS), again.predict(TEXTS), strict=True):
        assert before["label"] == after["label"]
        np.testing.assert_allclose(list(before["probabilities"].values()), list(after["probabilities"].values()), 1e-5)


@pytest.mark.parametrize(
    ("c", "settings", "why"),
    [
        (of_bert("roberta", pooler=False, types=1, offset=1), classify.Config(labels=LABELS, bias=True),
         r"^model: RobertaForSequenceClassification reads states through the layer pooler \(tanh\), and this model's "
         r"head through no layer; fine-tune anew with --start$"),
        (MODERN, tag.Config(labels=LABELS), ""),
        (dataclasses.replace(MODERN, task_transform=False), tag.Config(labels=LABELS),
         r"^model: ModernBertForTokenClassification reads states through the layer transform \(gelu\),"),
        (gpt2.Config(**SHAPE), classify.Config(labels=LABELS, bias=True), r"^objective\.bias: classify_bias has no"),
        (of_bert(), choice.Config(bias=False), r"^objective\.bias: files of bert have a bias in this head"),
        (t5.Config(), classify.Config(labels=LABELS), r"^t5: published files have no head for SequenceClass"),
    ],
)  # fmt: skip
def test_heads_that_no_published_class_has(c, settings, why):
    if not why:
        assert task_heads.export(MODELS.of(c), c, settings, {}).config == c
        return
    with pytest.raises(ValueError, match=why):
        task_heads.export(MODELS.of(c), c, settings, {})


@pytest.mark.slow
def test_a_decoder_that_learned_classes_reads_texts_as_its_tokenizer_does(one_device, tmp_path):
    """From a language model, then on from its own export, which has no head for tokens."""
    start = tiny_published.directory(tmp_path / "start", dataclasses.replace(LLAMA, tied=False))
    trained = jaxlm.train(run(tmp_path, start, table(tmp_path, LABELS))).open()
    assert "classify_bias" not in trained.params and not trained.pretrained.objective.settings.bos
    notes, _ = convert.export(tmp_path / "r", tmp_path / "hf")
    assert "left out, because the head doesn't read it: head" in notes
    told = jaxlm.open(tmp_path / "hf").predict(TEXTS)
    for before, after in zip(trained.predict(TEXTS), told, strict=True):
        np.testing.assert_allclose(list(before["probabilities"].values()), list(after["probabilities"].values()), 1e-5)
    on = run(tmp_path / "on", tmp_path / "hf", table(tmp_path, LABELS))
    assert not on.model.head and jaxlm.train(on).finished


def test_earlier_runs_go_on_as_they_were(tmp_path):
    """Their configurations lack the settings of the head, and had other values than those that are usual now."""
    config_io.dump(Run("r", LLAMA, classify.Config(labels=LABELS, bias=False)), tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("bias", "bos"):
        del values["objective"][name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    earlier = run_directory.read_config(tmp_path).objective
    assert earlier.bias is True and earlier.bos is True
    assert task_heads.with_published_bias(Run("r", LLAMA, earlier), llama).objective.bias is True


def test_what_a_published_classifier_says_from_the_command_line(classifier, tmp_path, capsys):
    assert cli.main(["predict", str(classifier), "--text", TEXTS[0]]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["label"] in LABELS and list(told["probabilities"]) == list(LABELS)
    assert told["label"] == max(told["probabilities"], key=told["probabilities"].get)
    assert jaxlm.open(classifier).predict({"text": "the film", "text2": "was bad"}) != told, "a pair has two texts"
    assert cli.main(["eval", str(classifier), "--data", table(tmp_path, ("good", "bad")), "--json"]) == 0
    assert {"accuracy", "f1_macro"} <= json.loads(capsys.readouterr().out.splitlines()[-1]).keys()
    assert cli.main(["eval", str(classifier), "--data", table(tmp_path, ("grand",))]) == 2
    assert "unknown label 'grand'; did you mean" in capsys.readouterr().err
    for command in (["generate", str(classifier), "so"], ["export", str(classifier), str(tmp_path / "x.gguf"),
                    "--format", "gguf"]):  # fmt: skip
        assert cli.main(command) == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.gguf").exists()


def first_weights(made: Run) -> dict:
    start = StartModel(made.start)
    return open_model.first_params(programs.program(made, start.source.tokens), start)


def test_a_run_goes_on_from_a_head_of_the_same_labels(classifier, tmp_path, capsys):
    theirs = jaxlm.open(classifier).params
    made = run(tmp_path, classifier, table(tmp_path, ("good", "bad")))
    assert made.objective.labels == LABELS, "those of the head, in its order"
    np.testing.assert_array_equal(first_weights(made)["classify"], theirs["classify"])
    assert "head" not in capsys.readouterr().out
    # With other labels, by name, it is a new one.
    other = run(tmp_path, classifier, table(tmp_path, ("yes", "no")), objective={"labels": ("no", "yes", "x")})
    assert "classify" not in first_weights(other)
    assert "new, for no, yes, x; that of " in capsys.readouterr().out
    regression = run(tmp_path, classifier, table(tmp_path, ("1", "2")), classify.Config(kind="regression"))
    assert "classify" not in first_weights(regression)
    with pytest.raises(ValueError, match=r"^start: .*theirs has a head for bad, good, so, and the training data has "
                       r"grand; name all labels in objective\.labels for a new head$"):  # fmt: skip
        run(tmp_path, classifier, table(tmp_path, ("good", "grand")))
    with pytest.raises(
        ValueError, match=r"^objective\.labels: the head of .* has these labels in the order bad,good,so"
    ):
        first_weights(run(tmp_path, classifier, table(tmp_path, LABELS), objective={"labels": LABELS[::-1]}))


def test_outputs_without_names_get_those_of_the_run(classifier, tmp_path, capsys):
    """A config.json that names no labels: transformers calls them LABEL_0 and so on."""
    folder = tmp_path / "unnamed"
    folder.mkdir()
    for file in classifier.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    edit(folder, id2label=None, label2id=None, num_labels=3, problem_type=None)
    data = table(tmp_path, LABELS)
    with pytest.raises(ValueError, match=r"name its outputs in their order in objective\.labels to go on from it"):
        run(tmp_path, folder, data)
    made = run(tmp_path, folder, data, objective={"labels": LABELS})
    np.testing.assert_array_equal(first_weights(made)["classify"], jaxlm.open(classifier).params["classify"])
    assert "whose outputs are now bad, good, so" in capsys.readouterr().out


def edit(folder: Path, **values) -> None:
    file = folder / "config.json"
    old = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in old.items() if value is not None}))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (dict(id2label={"0": "a", "1": "b"}), r"classifier\.weight is \[3, 16\], but config\.json makes it \[2, 16\]"),
        (dict(id2label={"0": "a", "1": "b", "3": "c"}), r"id2label has the keys 0, 1, 3; give one for each output"),
        (dict(id2label={"0": "a", "1": "a", "2": "c"}), r"id2label has the label 'a' twice"),
        (dict(num_labels=2), r"num_labels is 2, and id2label names 3 outputs; correct one of them"),
        (dict(id2label=["a", "b"]), r"id2label is \['a', 'b'\]; it must be an object"),
        (dict(problem_type="ranking"), r"config\.json: problem_type 'ranking' is unknown; known: single_label_class"),
        (dict(problem_type="regression"), r"a regression with 3 outputs is not read, only one number"),
        (dict(architectures=["BertForTokenClassification"]), r"2 tensors are missing|not this model's|predicts no"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_its_head(values, why, classifier, tmp_path):
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for file in classifier.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    edit(folder, **values)
    if "architectures" in values:  # the same matrix, and BERT's taggers have no use for the pooler
        assert type(model_source.describe(folder).head) is tag.Config
        return
    with pytest.raises(ValueError, match=why) as told:
        jaxlm.open(folder)
    assert "\n" not in str(told.value)


def test_a_head_that_no_file_here_has_is_refused(tmp_path):
    folder = tiny_published.directory(tmp_path / "llama", LLAMA)
    edit(folder, architectures=["LlamaForQuestionAnswering"])
    with pytest.raises(ValueError, match=r"config\.json: architectures: the head of LlamaForQuestionAnswering is not"):
        model_source.describe(folder)


CASES = {
    "classes": (of_bert(), classify.Config(labels=LABELS, bias=True), TEXTS),
    "multi": (of_bert(), classify.Config(kind="multi", labels=LABELS, bias=True), TEXTS),
    "number": (of_bert(), classify.Config(kind="regression", bias=True), TEXTS),
    "distilbert": (of_bert("distilbert", types=0, pooler_activation="relu"), classify.Config(labels=LABELS, bias=True),
                   TEXTS),
    "modernbert": (MODERN,
                   classify.Config(labels=LABELS, bias=True), TEXTS),
    "gpt2": (gpt2.Config(**SHAPE), classify.Config(labels=LABELS, bias=False), TEXTS),
    "llama": (dataclasses.replace(LLAMA, head=False), classify.Config(labels=LABELS, bias=False), TEXTS),
    "tags": (of_bert(pooler=False), tag.Config(labels=("O", "B-PER", "I-PER", "B-LOC")),
             ["Ann lives in Paris.", "Bob, so good"]),
    "spans": (of_bert(pooler=False), answer.Config(no_answer=False),
              [{"question": "who lives in paris?", "context": "ann lives in paris. bob lives in london"}]),
    "choices": (of_bert(), choice.Config(bias=True), [{"context": "the film was", "choices": ["good", "so bad"]}]),
}  # fmt: skip


def test_an_imported_tagger_is_a_run_that_is_exported_as_it_was(tmp_path):
    tiny_published.directory(tmp_path / "theirs", *CASES["tags"][:2])
    jaxlm.import_model(tmp_path / "theirs", tmp_path / "run")
    _, record = convert.export(tmp_path / "run", tmp_path / "hf")
    assert record["max_abs_difference"] == 0
    theirs, ours = (safetensors.numpy.load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "hf"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "hf"))
    assert before == after | {name: before[name] for name in ("pad_token_id",)}
    assert after["architectures"] == ["BertForTokenClassification"] and after["id2label"]["3"] == "B-LOC"


@pytest.mark.parametrize("name", CASES)
def test_pipelines_of_transformers_answer_as_predict_does(name, tmp_path):
    """An imported model is a run, which is exported."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: no pipeline is compared")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no pipeline is compared")
    c, settings, given = CASES[name]
    tiny_published.directory(tmp_path / "theirs", c, settings)
    jaxlm.import_model(tmp_path / "theirs", tmp_path / "run")
    convert.export(tmp_path / "run", tmp_path / "hf")
    told, there = jaxlm.open(tmp_path / "run").predict(given), str(tmp_path / "hf")
    assert jaxlm.open(tmp_path / "hf").predict(given) == told
    tokens = transformers.AutoTokenizer.from_pretrained(there)
    if name == "tags":
        found = transformers.pipeline("token-classification", model=there, ignore_labels=[])(given)
        assert [[word["entity"] for word in words] for words in found] == [one["tags"] for one in told]
    elif name == "spans":  # its pipeline is gone from transformers 5
        model = transformers.AutoModelForQuestionAnswering.from_pretrained(there)
        q = given[0]
        read = tokens(q["question"], q["context"], return_tensors="pt", return_offsets_mapping=True)
        places, inside = read.pop("offset_mapping")[0].numpy(), np.array(read.sequence_ids(0)) == 1
        with torch.no_grad():
            out = model(**read)
        start, end = (z[0].numpy() for z in (out.start_logits, out.end_logits))
        scores = np.where(inside[:, None] & inside & np.tri(len(inside), dtype=bool).T, start[:, None] + end, -np.inf)
        a, z = np.unravel_index(scores.argmax(), scores.shape)
        assert told[0]["answer"] == q["context"][places[a][0] : places[z][1]]
        np.testing.assert_allclose(told[0]["score"], scores[a, z] - start[0] - end[0], atol=1e-4)
    elif name == "choices":
        model = transformers.AutoModelForMultipleChoice.from_pretrained(there)
        several = given[0]["choices"]
        read = tokens([given[0]["context"]] * len(several), several, return_tensors="pt", padding=True)
        with torch.no_grad():
            z = model(**{k: v[None] for k, v in read.items()}).logits[0]
        np.testing.assert_allclose(told[0]["probabilities"], torch.softmax(z, -1).numpy(), atol=1e-5)
    else:
        found = transformers.pipeline("text-classification", model=there, top_k=None)(given)
        for theirs, ours in zip(found, told, strict=True):
            expected = ours.get("probabilities") or {"LABEL_0": ours["value"]}
            assert {one["label"] for one in theirs} == expected.keys()
            for one in theirs:
                assert one["score"] == pytest.approx(expected[one["label"]], abs=1e-4)
