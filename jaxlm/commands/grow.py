"""`jaxlm grow` makes a larger model of a trained one."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Model, start_processes
from jaxlm.core.ranges import Count, Natural, NonNegative


@dataclass(frozen=True)
class Grow(Command):
    """Makes a larger model that computes the same, in a run directory to start from; give one of the first five
    options.

    example: jaxlm grow runs/quickstart runs/larger --blocks 2
    """

    model: Model
    target: Annotated[Positional[str], arg(metavar="RUN_DIR", help="a new directory")]
    blocks: Natural = 0
    """New layers that add nothing at first, each behind one of as many equal groups of layers."""
    stack: Natural = 0
    """How many times the whole stack of layers stands in the new model; the function changes."""
    widen: tuple[str, ...] = ()
    """New sizes as FIELD=N, by the names of the model's config: ffn=4096 heads=16 kv_heads=8 width=2048."""
    experts: Natural = 0
    """Experts that each feed-forward network becomes, all alike at first."""
    vocab: str = ""
    """New size of the vocabulary, or a tokenizer that adds tokens to the model's own."""
    top_k: Count = 2
    """experts: how many of them a token goes to."""
    noise: NonNegative = 0.0
    """widen: how unequally copies share what they send on, in deviations of a weight; the function stays."""
    seed: Natural = 0
    """Of routers and of the noise."""
    step: Natural | None = None
    """The checkpoint's; None: the newest."""

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import grow

        names = ("blocks", "stack", "widen", "experts", "vocab", "top_k", "noise", "seed")
        growth = grow.Growth(**{name: getattr(self, name) for name in names})
        notes, record = grow.grow(self.model, self.target, growth, self.step)
        print(*notes, sep="\n")
        print(
            f"logits before and after: off by {record['relative_difference']:.2g} of their deviation, at most by "
            f"{record['max_abs_difference']:.2g}; same likeliest token at {record['same_top_token']:.1%} of places"
        )
        return Done({"folder": self.target, "notes": notes, **record})
