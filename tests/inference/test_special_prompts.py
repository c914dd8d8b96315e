"""Special tokens that a prompt spells are read as such by choice, and the choice is told."""

from support.tiny_models import published

from jaxlm.assembly import generate_text, open_model


def test_special_tokens_of_a_prompt(tmp_path, capsys):
    p = open_model.open_model(published(tmp_path / "llama"))
    tokens = p.tokens
    bos, eos = tokens.bos_id, tokens.eos_id
    text = f"{tokens.piece(bos)}a{tokens.piece(eos)}b"
    [spelled], _ = generate_text._prompts(p, [text], False)
    assert spelled == [*p.boundary_ids[0], *tokens.encode(text)] and eos not in spelled
    told = capsys.readouterr().err
    assert (
        f"prompt: {tokens.piece(bos)}, {tokens.piece(eos)} are read as characters; with `special` (--special)" in told
    )
    [read], _ = generate_text._prompts(p, [text], True)
    assert read == [bos, *tokens.encode("a"), eos, *tokens.encode("b")], "and BOS once"
    assert f"{tokens.piece(eos)} are read as special tokens" in capsys.readouterr().err
    assert generate_text._prompts(p, ["plain"], True) == generate_text._prompts(p, ["plain"], False)
    assert capsys.readouterr().err == ""
