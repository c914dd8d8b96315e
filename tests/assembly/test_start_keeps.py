"""A run that starts from a model keeps what lies beside its weights: how it ends, what it advises, how chats read."""

import dataclasses
import json

import pytest
from support.tiny_models import published

from jaxlm.assembly import convert, generate_text, model_source, open_model
from jaxlm.core import config
from jaxlm.models import bert, llama
from jaxlm.objectives import causal, classify, preference, sft

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<sep>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501
ADVICE = dict(
    eos_token_id=[65, 66], max_new_tokens=7, repetition_penalty=1.5, early_stopping=True, num_beams=2, typical_p=0.3
)


def described(tmp_path, objective, name="llama", model=llama) -> open_model.Pretrained:
    """A run that starts from the published model, as it stands before its first step."""
    start = open_model.StartModel(str(tmp_path / name))
    run = config.Run("r", model.Config(), objective, out=str(tmp_path))
    run = open_model.starting(run, start)
    open_model.save_description(run, start.source.tokens, start)
    return open_model.Pretrained(model_source.describe(tmp_path / "r"), None, None, None)


@pytest.fixture
def llama_files(tmp_path):
    folder = published(tmp_path / "llama")
    (folder / "generation_config.json").write_text(json.dumps(ADVICE))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"pad_token_id": 9}))
    return folder


def test_settings_of_generation_are_kept(llama_files, tmp_path, capsys):
    found = described(tmp_path, causal.Config())
    theirs = model_source.describe(llama_files)
    assert found.source.advice == theirs.advice and found.source.advice.pad == 9
    assert set(found.eos) == {65, 66, found.tokens.eos_id}
    how = generate_text.settings(found.source)
    assert (how.tokens, how.repetition_penalty, how.early_stopping, how.beams) == (7, 1.5, "yes", 2)
    assert "left out: typical_p" in capsys.readouterr().err
    again = open_model.StartModel(str(tmp_path / "r"))  # and on to the next run
    run = open_model.starting(config.Run("s", llama.Config(), causal.Config(), out=str(tmp_path)), again)
    open_model.save_description(run, again.source.tokens, again)
    assert model_source.describe(tmp_path / "s").advice == theirs.advice


@pytest.mark.parametrize("objective", [sft, preference])
def test_a_template_of_the_objectives_own_is_the_models(llama_files, tmp_path, objective):
    pytest.importorskip("jinja2")
    (llama_files / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = described(tmp_path, objective.Config(template=TEMPLATE))
    assert found.source.templates["default"] == TEMPLATE
    assert (tmp_path / "r" / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE
    assert set(found.eos) == {65, 66, found.tokens.eos_id, found.tokens.sep_id}
    (tmp_path / "r" / "tokenizer" / "chat_template.jinja").unlink()  # as runs from before have it
    assert model_source.describe(tmp_path / "r").templates["default"] == TEMPLATE


def test_a_template_of_the_model_is_kept_and_ends_turns(llama_files, tmp_path):
    pytest.importorskip("jinja2")
    (llama_files / "chat_template.jinja").write_text(TEMPLATE)
    found = described(tmp_path, sft.Config())
    assert found.source.templates["default"] == TEMPLATE and found.tokens.sep_id in found.eos
    assert found.tokens.sep_id not in described(tmp_path / ".", causal.Config()).eos


def test_files_of_sentence_transformers_are_kept(tmp_path):
    folder = published(tmp_path / "bert", "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [dict(path=path, type=f"sentence_transformers.models.{kind}") for kind, path in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 11}')
    found = described(tmp_path, classify.Config(labels=("a", "b")), "bert", bert)
    recipe = generate_text.read_recipe(found.source.path)
    assert (recipe.pooling, recipe.normalize, recipe.longest) == ("cls", False, 11)


def test_what_is_kept_reaches_chats_and_exports(llama_files, tmp_path):
    """A run's export says what the model that it started from said: stop ids, settings, templates, its licence; and
    nothing of where files lie here."""
    pytest.importorskip("jinja2")
    (llama_files / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    (llama_files / "additional_chat_templates").mkdir()
    (llama_files / "additional_chat_templates" / "tools.jinja").write_text("tools of {{ messages[0].content }}")
    (llama_files / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base")
    found = described(tmp_path, sft.Config(template=TEMPLATE))
    data = config.Data(train=(str(tmp_path / "mail.jsonl"), "stdlib"), tokenizer="bytes")
    run = dataclasses.replace(found.source.run, data=data)
    source = dataclasses.replace(found.source, run=run)
    base = open_model.open_model(llama_files)
    tuned = open_model.Pretrained(source, base.model, base.params, base.mesh)
    templates = {"default": TEMPLATE, "tools": "tools of {{ messages[0].content }}"}
    assert source.templates == templates
    convert.export(tuned, tmp_path / "out")
    out = model_source.describe(tmp_path / "out")
    assert out.templates == templates and out.licence == "apache-2.0"
    ends = {65, 66, found.tokens.eos_id, found.tokens.sep_id}
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written | ADVICE | {"eos_token_id": sorted(ends)} == written and out.advice.pad == 9
    assert set(tuned.eos) == set(out.advice.eos) == ends, "the end of the run's own turns too"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "objective sft" in card and "on `mail.jsonl`, `stdlib`" in card
    assert "from llama:" in card and "The card of llama states the licence apache-2.0" in card
    for file in ("README.md", "export.json"):
        assert str(tmp_path) not in (tmp_path / "out" / file).read_text()
