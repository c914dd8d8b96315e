"""`jaxlm augment` makes more labelled examples from a table or from tagged words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, Flag, start_processes
from jaxlm.core.ranges import Count, Natural, NonNegative, PositiveShare


@dataclass(frozen=True)
class Augment(Command):
    """Makes more labelled examples: words that a masked model puts in, or texts translated there and back.

    example: jaxlm augment train.tsv --method mask --model runs/bert --text sentence --out more.tsv
    """

    file: Annotated[Positional[str], arg(metavar="FILE", help="a .csv, .tsv or .jsonl table, or CoNLL columns")]
    method: Literal["mask", "back_translate"]
    """mask: words are replaced by a masked model; back_translate: texts are translated there and back."""
    model: str
    """mask: an encoder with a language-model head; back_translate: an encoder-decoder. A run directory, a Hugging Face
    directory or hf:OWNER/NAME."""
    out: Path
    """A new file of the same format, of the new examples alone."""
    back: str | None = None
    """back_translate: an encoder-decoder that translates back."""
    text: str = "text"
    """The column of a table that is changed."""
    columns: str = ""
    """A,B: the columns of a .csv or .tsv whose first line is no header."""
    word: int = 0
    """The column of CoNLL words."""
    tag: int = -1
    """The column of CoNLL tags; -1 is the last."""
    entities: Flag = False
    """Replace words of entities too, which else stay."""
    share: PositiveShare = 0.15
    """mask: the share of the words that is replaced."""
    top_k: Count = 10
    """mask: draw from so many of the likeliest words."""
    copies: Count = 1
    """New examples of each."""
    prefix: str = ""
    """back_translate: text before each, such as T5's task."""
    back_prefix: str = ""
    """The same of --back."""
    temperature: NonNegative = 0.0
    """back_translate: 0 writes the likeliest text."""
    beams: Count = 1
    """back_translate: beams of the search; 1 is none."""
    tokens: Count = 128
    """back_translate: the most new tokens of a text."""
    seed: Natural = 0

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import augment
        from jaxlm.inference.sampling import Sampling

        how = Sampling(tokens=self.tokens, temperature=self.temperature, beams=self.beams)
        columns = tuple(name for name in self.columns.split(",") if name)
        said = augment.augment(
            self.file, self.out, self.method, self.model, self.back, text=self.text, columns=columns, word=self.word,
            tag=self.tag, entities=self.entities, share=self.share, top_k=self.top_k, copies=self.copies,
            prefixes=(self.prefix, self.back_prefix), how=how, seed=self.seed,
        )  # fmt: skip
        print(said)
        return Done({"out": self.out, "said": said})
