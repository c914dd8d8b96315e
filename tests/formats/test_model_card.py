"""A model card tells what is known of data, licence and start, and never where files lie on this machine."""

import pytest

from jaxlm.formats import model_card

VALUES = dict(architectures=["LlamaForCausalLM"], model_type="llama", dtype="float32")


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# X", "apache-2.0"),
        ("---\r\nlanguage: en\r\nlicense: 'mit'  \r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3.1\nlicense_link: LICENSE\n---", "llama3.1"),
        ("---\nlicense: other\n---", "other"),
        ("---\ntags:\n- a\n---\nlicense: mit", ""),
        ("# X\n\nlicense: mit", ""),
    ],
)
def test_the_licence_of_a_card(front, expected, tmp_path):
    (tmp_path / "README.md").write_bytes(front.encode())
    assert model_card.licence(tmp_path) == expected
    (tmp_path / "run").mkdir()
    model_card.keep(tmp_path / "run", tmp_path, "from a file")
    assert model_card.licence(tmp_path / "run") == expected, "and a run that starts from the model has it"
    (tmp_path / "next").mkdir()
    model_card.keep(tmp_path / "next", tmp_path / "run")
    assert model_card.licence(tmp_path / "next") == expected
    (tmp_path / "bare").mkdir()
    assert model_card.licence(tmp_path / "bare") == ""
    model_card.keep(tmp_path / "bare", tmp_path / "nothing", "gemma")
    assert model_card.licence(tmp_path / "bare") == "gemma"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/ann/data/mail.jsonl", "mail.jsonl"),
        ("~/corpus/", "corpus"),
        ("../data/*.txt", "data/*.txt"),
        ("/a/**/x[0-9].txt", "**/x[0-9].txt"),
        ("stdlib", "stdlib"),
        ("tfds:wiki/en:train", "tfds:wiki/en:train"),
        ("tfds:/prepared/wiki/en", "tfds:en"),
        ("hf:owner/name@v1", "hf:owner/name@v1"),
        ("/models/llama+/home/ann/adapter", "llama+adapter"),
        ("C:\\data\\x.txt", "x.txt"),
        ("/", "a local folder"),
    ],
)
def test_places_are_named_without_their_paths(place, name):
    assert model_card.name_of(place) == name


def test_a_card_states_the_licence_and_the_start_on_a_hub(tmp_path):
    model_card.write(tmp_path, VALUES, 1234, model_card.About("Trained so.", "hf:owner/base@v1", "mit"))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\nbase_model: owner/base\nlibrary_name: transformers\n")
    assert "Trained so." in text and "The card of hf:owner/base@v1 states the licence mit" in text
    assert model_card.licence(tmp_path) == "mit"
    model_card.write(tmp_path, VALUES, 1234, model_card.About())
    text = (tmp_path / "README.md").read_text()
    assert "license" not in text and "base_model" not in text and "was not recorded" in text
