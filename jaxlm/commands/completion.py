"""`jaxlm completion` writes a script for a shell that completes commands and their options."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, OnRun
from jaxlm.core import config_io, typed_arguments

# tyro's function completes commands, options and their choices; this adds names of configs and files.
BASH = """
_jaxlm() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"
  COMPREPLY=()
  if [[ $COMP_CWORD -eq 1 || "$cur" == -* || "$prev" == -* || ( $COMP_CWORD -eq 2 && "$prev" =~ ^(GROUPS)$ ) ]]; then
    _tyro_jaxlm
    [[ -n "${COMPREPLY[*]}" ]] || COMPREPLY=()
  elif [[ " ${COMP_WORDS[*]:0:COMP_CWORD}" =~ ^\\ [^\\ ]+\\ (RUNS)$ ]]; then
    COMPREPLY=($(compgen -W "CONFIGS" -- "$cur") $(compgen -f -- "$cur"))
  fi
}
complete -o default -F _jaxlm jaxlm
"""
ZSH = """
_jaxlm() {
  if [[ $CURRENT -eq 2 || $words[CURRENT] == -* || $words[CURRENT-1] == -* ||
        ( $CURRENT -eq 3 && $words[2] =~ "^(GROUPS)$" ) ]]; then
    _tyro_jaxlm "$@"
  else
    [[ "${(j: :)words[2,CURRENT-1]}" =~ "^(RUNS)$" ]] && compadd -- CONFIGS
    _files
  fi
}
if [[ $funcstack[1] == _jaxlm ]]; then _jaxlm "$@"; else compdef _jaxlm jaxlm; fi
"""


@dataclass(frozen=True)
class Completion(Command):
    """Prints a script that completes commands, options, names of configs and files. Write it where the shell looks:
    bash: ~/.local/share/bash-completion/completions/jaxlm, or a file that ~/.bashrc sources; zsh: a file _jaxlm in a
    folder of fpath; fish: ~/.config/fish/completions/jaxlm.fish.

    example: jaxlm completion bash > ~/.local/share/bash-completion/completions/jaxlm
    """

    shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], arg(metavar="bash|zsh|fish", help="the shell")]

    def run(self, rest: list[str]) -> Done:
        from jaxlm.commands import cli

        kinds = {name: cli.command(name) for name in cli.COMMANDS}
        groups = sorted({name.partition(" ")[0] for name in kinds if " " in name})
        runs = [name for name, kind in kinds.items() if issubclass(kind, OnRun)]
        for name, kind in kinds.items():
            if more := kind.more("quickstart" if name in runs else ""):
                kinds[name] = typed_arguments.with_part(kind, *more)
        script = typed_arguments.completion(kinds, "jaxlm", self.shell)
        if self.shell == "zsh":  # its last line completes at once; the function below does, and calls it
            script = script.rstrip().removesuffix('_tyro_jaxlm "$@"')
        own = {"bash": BASH, "zsh": ZSH}.get(self.shell, "")
        for mark, words in (
            ("GROUPS", "|".join(groups)),
            ("RUNS", "|".join(runs)),
            ("CONFIGS", " ".join(config_io.names())),
        ):
            own = own.replace(mark, words)
        print(script + own)
        return Done({"shell": self.shell, "script": script + own})
