"""`jaxlm grow`: from a model's place to a run directory that opens, starts a run and exports."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny_models import published

import jaxlm
from jaxlm.commands import cli


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("models") / "llama", layers=2)


def test_a_grown_model_opens_and_says_what_is_new(llama, tmp_path, capsys):
    assert cli.main(["grow", str(llama), str(tmp_path / "larger"), "--blocks", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["new_layers"] == {"": [1, 3]} and said["relative_difference"] == 0
    assert "to train them alone: --optim.only-layers 1 3" in said["notes"]
    assert json.loads((tmp_path / "larger" / "grown.json").read_text())["growth"] == "blocks"
    run = jaxlm.RunDirectory(tmp_path / "larger").config
    assert (run.model.layers, run.data.train, run.start) == (4, (), "")
    old, new = jaxlm.open(llama), jaxlm.open(tmp_path / "larger")
    np.testing.assert_array_equal(old.logits(["some text"])[0], new.logits(["some text"])[0])


def complaint(capsys, *args: object) -> str:
    assert cli.main([str(a) for a in args]) == 2
    line = capsys.readouterr().err
    assert line.startswith("jaxlm: ") and line.count("\n") == 1
    return line


def test_what_can_not_grow_is_refused_in_one_line_and_nothing_is_left(llama, tmp_path, capsys):
    out = tmp_path / "new" / "larger"
    for options, says in {
        (): "growth: give exactly one of blocks, stack, widen, experts, vocab",
        ("--blocks", 1, "--stack", 2): "not blocks and stack together",
        ("--blocks", 3): "--blocks: 2 layers do not divide into 3 equal groups",
        ("--widen", "ffn"): "--widen: 'ffn' is not FIELD=N",
        ("--widen", "fnn=4"): "unknown config key model.fnn; did you mean 'ffn'",
        ("--widen", "width=24"): "--widen: width 16 can't become 24",
        ("--blocks", 1, "--noise", 0.1): "--noise: only copies of widened layers",
        ("--vocab", 264): "--vocab: the model has 264 rows already",
        ("--vocab", llama): "llama has no token that the model's tokenizer lacks",
        ("--experts", 2, "--top-k", 3): "model.moe.top_k: 3 choices among 2 experts",
        ("--blocks", -1): "--blocks",
    }.items():
        assert says in complaint(capsys, "grow", llama, out, *options), options
        assert not out.parent.exists(), options
    (tmp_path / "there").write_text("mine")
    assert "there: is there already" in complaint(capsys, "grow", llama, tmp_path / "there", "--blocks", 1)


def test_a_function_that_would_change_is_refused(tmp_path, capsys):
    bert = published(tmp_path / "bert", "bert", pooler=False)
    line = complaint(capsys, "grow", bert, tmp_path / "larger", "--blocks", 1)
    assert "bert would not keep its function" in line and not (tmp_path / "larger").exists()
    line = complaint(capsys, "grow", bert, tmp_path / "larger", "--widen", "width=32", "heads=4")
    assert "head of this family is always its embedding" in line


def tokenizer(folder: Path, *added: str) -> Path:
    """A byte-level tokenizer, with tokens behind its own."""
    library = pytest.importorskip("tokenizers")
    letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    made = library.Tokenizer(library.models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": 256}, []))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.add_tokens(list(added))
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


def test_tokens_of_a_larger_tokenizer_begin_as_the_mean_of_their_pieces(tmp_path, capsys):
    old, new = tokenizer(tmp_path / "old"), tokenizer(tmp_path / "new", "ship", "<pad>")
    model = published(tmp_path / "model", vocab=258, layers=1)
    (tmp_path / "model" / "tokenizer.bytes").unlink(missing_ok=True)
    for file in old.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    before = jaxlm.open(model)
    grown = jaxlm.open(jaxlm.grow(model, tmp_path / "larger", vocab=new).path)
    rows, ids = {"embed", "head"}, before.tokenizer.encode("ship")
    assert len(ids) == 4 and grown.tokenizer.encode("ship") == [257]
    for path in rows:
        table, larger = np.asarray(before.params[path]), np.asarray(grown.params[path])
        assert larger.shape == (259, 16)
        np.testing.assert_array_equal(larger[:257], table[:257])
        np.testing.assert_allclose(larger[257], table[ids].mean(0), rtol=1e-5)
    line = complaint(capsys, "grow", tmp_path / "larger", tmp_path / "more", "--vocab", old)
    assert "--vocab: token 257 of" in line and "must come behind the old ones" in line


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", dict(blocks=2)), ("llama", dict(widen=dict(ffn=40, width=32))), ("llama", dict(experts=4)),
     ("gpt2", dict(blocks=1)), ("gpt2", dict(widen=dict(width=32, heads=4)))],
)  # fmt: skip
def test_transformers_computes_the_same_with_the_grown_model(family, options, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = dict(layers=2) | (dict(vocab=264, width=16, heads=2, positions=64) if family == "gpt2" else {})
    model = published(tmp_path / "model", family, **sizes)
    jaxlm.open(jaxlm.grow(model, tmp_path / "larger", **options).path).save(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 264, (2, 20))

    def logits(folder: Path) -> np.ndarray:
        read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return read(torch.from_numpy(tokens)).logits.numpy()

    old, new = logits(model), logits(tmp_path / "hf")
    assert np.abs(new - old).max() <= 1e-5 * max(1, np.abs(old).max())
