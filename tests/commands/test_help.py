"""Every command explains itself, whatever it is given beside `--help`."""

import dataclasses
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import jaxlm
from jaxlm.commands import cli
from jaxlm.core import typed_arguments

COMMANDS = (
    "train", "continual", "sweep", "coordinate", "work", "plan", "tune", "coordinate-check", "eval", "predict",
    "generate", "chat", "serve", "embed", "augment", "import", "export", "merge", "grow", "shrink", "extract",
    "compress", "tokenizer train", "data prepare", "data inspect", "board", "report", "doctor", "completion",
)  # fmt: skip


def shown(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert cli.main([*arguments, "--help"]) == 0
    out = capsys.readouterr()
    assert not out.err
    return out.out


def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        text = " ".join(shown(capsys, *command.split()).split())
        assert f"example: jaxlm {command}" in text and f"usage: jaxlm {command}" in text, command


def test_every_argument_is_explained(capsys):
    for command in COMMANDS:
        kind = cli.command(command)
        text = " ".join(shown(capsys, *command.split()).replace("│", "").split())
        for f in dataclasses.fields(kind):
            if f.name not in typed_arguments.positional(kind) and f.name != "seed":
                after = text.partition(f"--{f.name.replace('_', '-')} ")[2].partition("(default: ")[0]
                assert len(after.partition("(repeatable)")[0].split()) > 1, f"{command}: {f.name}"


def test_the_commands_are_all_of_them(capsys):
    listed = re.findall(r"^    ([a-z][a-z-]*(?: [a-z]+)?)  ", shown(capsys), re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    assert cli.main([]) == 2 and "usage: jaxlm" in capsys.readouterr().out
    assert re.findall(r"^    (\w+ \w+)  ", shown(capsys, "data"), re.MULTILINE) == ["data prepare", "data inspect"]


def test_arguments_have_the_names_that_they_have_in_the_library():
    """A function of the library and the command that does the same call their arguments by the same names."""
    for function, command in {
        jaxlm.load: "train", jaxlm.evaluate: "eval", jaxlm.plan: "plan", jaxlm.import_model: "import",
        jaxlm.merge: "merge", jaxlm.grow: "grow", jaxlm.shrink: "shrink", jaxlm.extract: "extract",
        jaxlm.LanguageModel.save: "export", jaxlm.LanguageModel.embed: "embed",
    }.items():  # fmt: skip
        kind = cli.command(command)
        names = {f.name for f in dataclasses.fields(kind)}
        if command == "train":
            names |= {f.name for f in dataclasses.fields(jaxlm.Run)}
        own = {p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD}
        objects = {
            "self",
            "run",
            "source",
            "texts",
        }  # a `Run`, or what becomes one; a command is given one --text at a time
        assert own - objects <= names, (function, own - objects - names)


def test_the_fields_of_a_config_are_shown_beside_the_options_of_the_command(capsys):
    text = shown(capsys, "train", "tiny_llama")
    assert "--dry-run" in text and "--optim.lr" in text


def test_a_long_list_of_names_is_cut(capsys):
    assert cli.main(["train", "tiny_llama", "--zzzzzz", "1"]) == 2
    line = capsys.readouterr().err
    assert "unknown config key zzzzzz; nearest of " in line and len(line) < 200


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evl"], "unknown command evl; did you mean 'eval'?"),
        (["data", "prepair"], "unknown command data prepair; did you mean 'data prepare'?"),
        (["eval"], "give MODEL; for example: jaxlm eval runs/quickstart --data README.md"),
        (["augment", "f"], "give --method; for example: jaxlm augment train.tsv --method mask"),
        (["augment", "f", "--method", "swap", "--model", "m", "--out", "o"],
         "--method: 'swap' is not one of mask, back_translate"),
        (["completion", "tcsh"], "bash|zsh|fish: 'tcsh' is not one of bash, zsh, fish"),
        (["eval", "m", "n"], "'n' is one argument too many"),
        (["eval", "m", "--bachtes", "3"], "unknown option --bachtes; did you mean '--batches'?"),
        (["eval", "m", "--batches", "few"], "--batches: 'few' is not a valid int"),
        (["eval", "m", "--batches"], "--batches: give a value"),
        (["eval", "m", "--data", "--json"], "--data: give a value"),
        (["generate", "--prompt", "a"], "give MODEL; for example: jaxlm generate runs/quickstart"),
        (["train", "--optim.lr", "1"], "give CONFIG|RUN_DIR; for example: jaxlm train quickstart"),
        (["eval", "m", "--out", "gs://bucket/x"], "--out: gs:/bucket/x is an address, and only local files"),
        (["train", "tiny_llama", "--out", "gs://bucket/runs"], "--out: gs:/bucket/runs/tiny_llama is an address"),
        (["eval", "m", "--plugin"], "--plugin: give a module, or a Python file"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(arguments, line, capsys):
    assert cli.main(arguments) == 2
    out = capsys.readouterr()
    assert out.err.startswith(f"jaxlm: {line}") and out.err.count("\n") == 1 and not out.out


def complete(script: Path, words: list[str]) -> list[str]:
    """Returns what bash completes the last of the words to."""
    code = f"""
    source {script}
    COMP_WORDS=({" ".join(f"'{w}'" for w in words)}); COMP_CWORD={len(words) - 1}
    _jaxlm; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def test_bash_completes_commands_options_choices_and_configs(capsys, tmp_path):
    scripts = {}
    for shell in ("bash", "zsh"):
        assert cli.main(["completion", shell]) == 0
        scripts[shell] = capsys.readouterr().out
    assert scripts["zsh"].startswith("#compdef jaxlm") and scripts["zsh"].rstrip().endswith("compdef _jaxlm jaxlm; fi")
    (script := tmp_path / "jaxlm.bash").write_text(scripts["bash"])
    for words, found in {
        ("jaxlm", "ev"): ["eval"],
        ("jaxlm", "eval", "--met"): ["--metric"],
        ("jaxlm", "data", "ins"): ["inspect"],
        ("jaxlm", "augment", "f", "--method", ""): ["mask", "back_translate"],
        ("jaxlm", "train", "tiny_l"): ["tiny_llama"],
        ("jaxlm", "data", "inspect", "tiny_l"): ["tiny_llama"],
        ("jaxlm", "train", "llama_1b", "--optim.warm"): ["--optim.warmup"],
        ("jaxlm", "generate", "m", "--temp"): ["--temperature"],
        ("jaxlm", "eval", "nothing-of-that-name"): [""],
    }.items():
        assert complete(script, list(words)) == found, words
