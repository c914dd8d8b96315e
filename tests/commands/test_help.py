"""Every command explains itself, whatever it is given beside `--help`."""

import re

import pytest

from jaxlm.commands import cli

COMMANDS = (
    "train", "plan", "tune", "eval", "generate", "chat", "embed", "augment", "import", "export", "tokenizer train",
    "data prepare", "data inspect", "report", "doctor",
)  # fmt: skip


def shown(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert not ended.value.code
    out = capsys.readouterr()
    assert not out.err
    return out.out


def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        text = " ".join(shown(capsys, *command.split()).split())
        assert f"example: jaxlm {command}" in text and f"usage: jaxlm {command}" in text, command


def test_the_commands_are_all_of_them(capsys):
    listed = re.findall(r"^    ([a-z]+) ", shown(capsys), re.MULTILINE)
    assert sorted(set(listed)) == sorted({command.split()[0] for command in COMMANDS})


def test_the_fields_of_a_config_are_shown_beside_the_options_of_the_command(capsys):
    text = shown(capsys, "train", "tiny_llama")
    assert "--dry-run" in text and "--optim.lr" in text


def test_a_long_list_of_names_is_cut(capsys):
    assert cli.main(["train", "tiny_llama", "--zzzzzz", "1"]) == 2
    line = capsys.readouterr().err
    assert "unknown config key zzzzzz; nearest of " in line and len(line) < 200
