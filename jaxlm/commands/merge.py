"""`jaxlm merge` makes one model of several of one shape."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Flag
from jaxlm.core.ranges import Finite, Natural, PositiveShare, Share
from jaxlm.weights.merging import MethodName, Rescale

_MODELS = "two or more models of one shape: run directories, Hugging Face directories, hf:OWNER/NAME"


@dataclass(frozen=True)
class Merge(Command):
    """Merges models of one shape into a Hugging Face directory, tensor by tensor, in little memory.

    example: jaxlm merge code-hf chat-hf --out both-hf --method ties --base base-hf --density 0.2
    """

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL", help=_MODELS)]
    out: Path
    """A new directory."""
    method: MethodName = "linear"
    """linear: weighted mean; slerp: along the arc between two; the others add what the models changed since --base:
    task_arithmetic all of it; ties the largest changes of the sign that prevails; dare_linear and dare_ties changes
    drawn at random; breadcrumbs those of middle size; model_stock their mean, as far as they point one way."""
    base: str | None = None
    """The model that the others began from."""
    weights: tuple[Finite, ...] = ()
    """How much each model counts, one number for each; none given: 1 each."""
    t: Share | None = None
    """slerp: how far from the first model to the second (0.5)."""
    density: PositiveShare | None = None
    """The share of each model's changes that is kept; ties: 0.2, dare_linear, dare_ties and breadcrumbs need one."""
    gamma: Share | None = None
    """breadcrumbs: the share of the changes, the largest ones, that is dropped (0.01)."""
    scale: Finite | None = None
    """Multiplies the merged change (1)."""
    rescale: Rescale | None = None
    """dare_linear, dare_ties: kept changes are divided by the density (density), made to add up to the same magnitude
    in each tensor as before (l1), or left as they are (none); density where none is given."""
    seed: Natural = 0
    """dare_linear, dare_ties: another one draws other changes."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What is written; None: the dtype of each tensor of the base, or of the first model."""
    any_tokenizer: Flag = False
    """Merge models whose tokenizers differ."""

    def run(self, rest: list[str]) -> Done:
        from jaxlm.assembly import merge
        from jaxlm.weights.merging import Settings

        settings = Settings(
            self.method, self.weights, self.t, self.density, self.gamma, self.scale, self.rescale, self.seed
        )
        made = merge.merge(
            self.models, self.out, settings, self.base, dtype=self.dtype, any_tokenizer=self.any_tokenizer
        )
        print(*made.notes, made.table(), sep="\n")
        models = [dict(zip(("place", "part", "bytes"), row, strict=True)) for row in made.models]
        return Done({"out": made.path, "models": models, "bytes": made.size, "seconds": made.seconds})
