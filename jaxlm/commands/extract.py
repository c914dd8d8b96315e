"""`jaxlm extract` makes an adapter of what a full fine-tuning changed."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Model, part, start_processes
from jaxlm.core.extraction import Extraction


@dataclass(frozen=True)
class Extract(Extraction, Command):
    """Makes a LoRA of the difference of two models, in files of Hugging Face PEFT, which `jaxlm` opens as
    BASE+FOLDER.

    example: jaxlm extract runs/tuned base-hf tuned-lora --rank 16
    """

    model: Model = field(kw_only=True)
    base: Annotated[Positional[str], arg(metavar="BASE", help="the model that it was trained from")] = field(
        kw_only=True
    )
    target: Annotated[Positional[str], arg(metavar="FOLDER", help="a new directory")] = field(kw_only=True)
    calibration: tuple[str, ...] = ()
    """Sources of text on which the adapter's products are to be nearest to those of the difference; empty: its numbers
    are."""

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import extract

        notes, record = extract.extract(self.model, self.base, self.target, part(self, Extraction), self.calibration)
        print(*notes, sep="\n")
        print(f"rank {record['rank']}: misses {record['missed']:.2%} of the squares of the matrices' changes")
        if "base_off_by" in record:
            print(
                f"logits off by {record['base_off_by']:.3g} of their deviation without it, by "
                f"{record['adapter_off_by']:.3g} with it"
            )
        return Done({"folder": self.target, "notes": notes, **record})
