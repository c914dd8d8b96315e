"""What lies beside the weights: settings and templates read, tokenizers carried byte for byte or made exactly."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import tokenizers as library

from jaxlm.core import spec
from jaxlm.core.weight_names import vector
from jaxlm.data import tokenizer, train_tokenizer
from jaxlm.formats import huggingface, model_card
from jaxlm.formats.hf_sidecars import Generation, chat_templates, read_generation

SPECS = {"x": spec.Spec((2,), (None,), spec.zeros)}
FAMILY = SimpleNamespace(
    names=lambda c: {"x": vector("x")},
    to_hf=lambda c: {"model_type": "toy", "architectures": ["ToyForCausalLM"], "decoder_start_token_id": 7},
    generates=True,
    kind="encoder_decoder",
)
ENCODER = SimpleNamespace(**vars(FAMILY) | {"generates": False, "kind": "encoder"})


def save(folder: Path, family=FAMILY, **more) -> list[str]:
    return huggingface.save(folder, family, None, SPECS, {"x": jnp.zeros(2)}, dtype="float32", **more)


def put(folder: Path, **files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------------------------- settings


def test_settings_with_ids_from_both_files(tmp_path):
    put(
        tmp_path,
        config__json={"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 4, "decoder_start_token_id": 0},
        generation_config__json={
            **{"eos_token_id": [5, 6], "do_sample": True, "temperature": 1, "top_k": 20, "top_p": 0.9},
            **{"repetition_penalty": 1.05, "max_new_tokens": 64, "transformers_version": "5.0", "use_cache": True},
            **{"suppress_tokens": [3], "penalty_alpha": 0.6, "output_scores": False, "pad_token_id": None},
        },
    )
    assert read_generation(tmp_path) == Generation(
        eos=(5, 6), bos=1, pad=4, start=0, sample=True, temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.05,
        new_tokens=64, banned=(3,), others=("penalty_alpha",),
    )  # fmt: skip
    (tmp_path / "generation_config.json").unlink()
    assert read_generation(tmp_path) == Generation(eos=(2,), bos=1, pad=4, start=0)
    (tmp_path / "config.json").unlink()
    assert read_generation(tmp_path) == Generation()


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 1.5), ("top_k", True), ("eos_token_id", ["x"]), ("do_sample", 1), ("top_p", "0.9")]
)
def test_a_setting_of_a_wrong_type(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name} is .*, which is not of type"):
        read_generation(put(tmp_path, generation_config__json={name: value}))


def test_settings_there_and_back(tmp_path):
    g = Generation(eos=(5, 6), bos=1, pad=0, sample=False, temperature=0.5, no_repeat_ngram=3, beams=4)
    assert "generation_config.json: written" in save(tmp_path, generation=g)
    assert read_generation(tmp_path) == Generation(**vars(g) | {"start": 7})  # config.json has its own start
    config = read(tmp_path / "config.json")
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == ([5, 6], 1, 0)


def test_an_encoder_has_no_settings(tmp_path):
    save(tmp_path, ENCODER, generation=Generation(pad=3))
    assert not (tmp_path / "generation_config.json").exists()
    assert read(tmp_path / "config.json")["pad_token_id"] == 3


# --------------------------------------------------------------------------------------------------------------- chat


def test_chat_templates_of_every_habit(tmp_path):
    assert chat_templates(tmp_path) == {}
    put(tmp_path, tokenizer_config__json={"chat_template": "one"})
    assert chat_templates(tmp_path) == {"default": "one"}
    several = [{"name": "default", "template": "one"}, {"name": "tools", "template": "two"}]
    put(tmp_path, tokenizer_config__json={"chat_template": several}, chat_template__json={"chat_template": "old"})
    assert chat_templates(tmp_path) == {"default": "one", "tools": "two"}
    put(tmp_path, chat_template__jinja="{{ new }}")
    put(tmp_path / "additional_chat_templates", rag__jinja="three")
    assert chat_templates(tmp_path) == {"default": "{{ new }}", "tools": "two", "rag": "three"}


@pytest.mark.parametrize("given", [3, ["x"], [{"name": "a"}]])
def test_a_chat_template_that_is_none(tmp_path, given):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template is"):
        chat_templates(put(tmp_path, tokenizer_config__json={"chat_template": given}))


# ------------------------------------------------------------------------------------------------------ what is written


def test_a_directorys_files_come_byte_for_byte(tmp_path):
    files = {
        name: f" {name}\r\n"
        for name in ("vocab__txt", "merges__txt", "tokenizer__json", "chat_template__jinja", "spiece__model")
    }
    source = put(tmp_path / "in", **files, config__json={"eos_token_id": 9}, modeling_x__py="raise SystemExit")
    put(source, generation_config__json='{"top_k": 5,\n\n "suppress_tokens": [1]}', tokenizer_config__json='{ "a":1 }')
    put(source / "additional_chat_templates", rag__jinja="rag")
    notes = save(tmp_path / "out", extra_files_from=source)
    carried = {p.relative_to(source) for p in source.rglob("*.*")} - {Path("config.json"), Path("modeling_x.py")}
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    own = {Path("config.json"), Path("model.safetensors"), Path("README.md")}
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*")} == carried | own
    assert read(tmp_path / "out/config.json")["eos_token_id"] == 9
    assert "generation_config.json: carried along" in notes and any("vocab.txt" in n and "carried" in n for n in notes)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        save(tmp_path / "out", extra_files_from=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


TEXTS = ["def f(x):\n    return x + 1\n", "The quick  brown\tfox.", "", "   ", "été 漢字 😀\x00", "</p> <b>"]


def corpus() -> list[str]:
    """Without control tokens, which a tokenizer.json reads out of any text."""
    return [
        Path(huggingface.__file__).with_name(name).read_text("utf-8")
        for name in ("huggingface.py", "shards.py", "safetensors.py")
    ]


def test_a_runs_sentencepiece_becomes_an_exact_tokenizer_json(tmp_path):
    tokens = train_tokenizer.train_sentencepiece(corpus(), tmp_path / "tokenizer/tokenizer.model", vocab_size=600)
    notes = save(tmp_path / "out", extra_files_from=tmp_path / "tokenizer")
    assert any(n.startswith("tokenizer.json, tokenizer_config.json: made from the run's tokenizer") for n in notes)
    theirs = library.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    for text in TEXTS + corpus():
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == tokens.encode(text) and theirs.decode(ids) == text
    again = tokenizer.load(tmp_path / "out")
    assert again.boundary_ids == ([], [3])  # a T5 reads EOS after its source
    assert isinstance(again, tokenizer.HuggingFace)
    for kind in tokenizer.KINDS:
        assert getattr(again, f"{kind}_id") == getattr(tokens, f"{kind}_id"), kind
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokens.model
    assert read_generation(tmp_path / "out") == Generation(eos=(3,), bos=2, pad=0, start=7)


def test_bytes_become_an_exact_tokenizer_json(tmp_path):
    tokens = tokenizer.Bytes()
    tokens.save(tmp_path / "tokenizer")
    save(tmp_path / "out", extra_files_from=tmp_path / "tokenizer")
    again = tokenizer.load(tmp_path / "out")
    assert again.vocab_size == tokens.vocab_size
    for text in TEXTS:
        assert again.encode(text) == tokens.encode(text) and again.decode(again.encode(text)) == text
    assert all(getattr(again, f"{kind}_id") == getattr(tokens, f"{kind}_id") for kind in tokenizer.KINDS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"add_dummy_prefix": True}, "a space is put before every text"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"text is normalised \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "repeated spaces are removed"),
        ({"byte_fallback": False}, "unknown characters have no bytes"),
        ({"model_type": "unigram"}, "it is not BPE"),
    ],
)
def test_what_would_not_be_exact_stays_sentencepiece_and_says_so(tmp_path, change, why, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "TRAINER", train_tokenizer.TRAINER | change)
    train_tokenizer.train_sentencepiece(corpus(), tmp_path / "tokenizer/tokenizer.model", vocab_size=500)
    notes = save(tmp_path / "out", extra_files_from=tmp_path / "tokenizer")
    (note,) = [n for n in notes if n.startswith("tokenizer.json: not written, it would not be exact")]
    assert re.search(why, note) and "tokenizer.model" in note
    assert (tmp_path / "out/tokenizer.model").is_file() and not (tmp_path / "out/tokenizer.json").exists()


def test_a_file_that_reads_a_text_otherwise_is_not_written(tmp_path, monkeypatch):
    from jaxlm.formats import tokenizer_json

    tokens = train_tokenizer.train_sentencepiece(corpus(), tmp_path / "x.model", vocab_size=600)
    for kind, boundary_ids in {"decoder": ([2], []), "encoder": ([5], [6]), "encoder_decoder": ([], [3])}.items():
        assert tokenizer.HuggingFace(tokenizer_json.convert(tokens, kind)[0]).boundary_ids == boundary_ids
    original = tokenizer_json._merges
    monkeypatch.setattr(tokenizer_json, "_merges", lambda scores: list(original(scores))[:-20])
    made, why = tokenizer_json.convert(tokens)
    assert made is None and "would be cut otherwise" in why


def test_a_runs_tokenizer_json_gets_a_class_that_takes_it_as_it_is(tmp_path):
    tokens = train_tokenizer.train_sentencepiece(corpus(), tmp_path / "x.model", vocab_size=600)
    from jaxlm.formats.tokenizer_json import convert

    own = tokenizer.HuggingFace(convert(tokens)[0], {"eos": "</s>"})
    own.save(tmp_path / "tokenizer")
    save(tmp_path / "out", extra_files_from=tmp_path / "tokenizer")
    assert (tmp_path / "out/tokenizer.json").read_text("utf-8") == own.json
    config = read(tmp_path / "out/tokenizer_config.json")
    assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


def test_the_card_says_what_is_known(tmp_path):
    save(tmp_path / "my-model", about=model_card.About("Trained on tiny stories."))
    text = (tmp_path / "my-model/README.md").read_text()
    assert "# my-model" in text and "2 parameters" in text and "Trained on tiny stories." in text
    assert "ToyForCausalLM.from_pretrained" in text and "float32" in text
    save(tmp_path / "b")
    assert "was not recorded" in (tmp_path / "b/README.md").read_text()
    save(tmp_path / "c", card=False)
    assert not (tmp_path / "c/README.md").exists()
