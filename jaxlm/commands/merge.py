"""`jaxlm merge` makes one model of several of one shape."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Flag, part
from jaxlm.core.merging import Settings

_MODELS = "two or more models of one shape: run directories, Hugging Face directories, hf:OWNER/NAME"


@dataclass(frozen=True)
class Merge(Settings, Command):
    """Merges models of one shape into a Hugging Face directory, tensor by tensor, in little memory.

    example: jaxlm merge code-hf chat-hf --out both-hf --method ties --base base-hf --density 0.2
    """

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL", help=_MODELS)] = field(kw_only=True)
    out: Path = field(kw_only=True)
    """A new directory."""
    base: str | None = None
    """The model that the models began from, for the methods that add what they changed."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What is written; None: the dtype of each tensor of the base, or of the first model."""
    any_tokenizer: Flag = False
    """Merge models whose tokenizers differ."""

    def run(self, rest: list[str]) -> Done:
        from jaxlm.assembly import merge

        settings = part(self, Settings)
        made = merge.merge(
            self.models, self.out, settings, self.base, dtype=self.dtype, any_tokenizer=self.any_tokenizer
        )
        print(*made.notes, made.table(), sep="\n")
        models = [dict(zip(("place", "part", "bytes"), row, strict=True)) for row in made.models]
        return Done({"out": made.path, "models": models, "bytes": made.size, "seconds": made.seconds})
