"""`jaxlm tokenizer train`, `jaxlm data prepare` and `jaxlm data inspect` make tokens and show them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done, OnRun
from jaxlm.core.ranges import Count


@dataclass(frozen=True)
class TokenizerTrain(Command):
    """Trains a lossless SentencePiece tokenizer with byte fallback.

    example: jaxlm tokenizer train stdlib --vocab 8192 --out code.model
    """

    source: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE", help="texts, as data.train names them")]
    out: Path
    """The new .model file."""
    vocab: Count = 8192
    """Pieces of the vocabulary."""
    field: str = "text"
    """The field that holds the text in JSONL, Parquet and TFDS records."""

    def run(self, rest: list[str]) -> Done:
        from jaxlm.data import token_cache, train_tokenizer

        texts = (text for source in self.source for text in token_cache.texts(source, field=self.field, part="train"))
        made = train_tokenizer.train_sentencepiece(texts, self.out, vocab_size=self.vocab, name=", ".join(self.source))
        print(f"{self.out}: {made.vocab_size} pieces")
        return Done({"out": self.out, "pieces": made.vocab_size})


@dataclass(frozen=True)
class DataPrepare(OnRun):
    """Tokenises the data of a config into its cache.

    example: jaxlm data prepare quickstart
    """

    def run(self, rest: list[str]) -> Done:
        run, start, _ = self.load(rest)
        from jaxlm.assembly import corpus, open_model

        data = corpus.corpus(run.data, open_model.bound_objective(run, start))
        print(*data.described(run.data), sep="\n")
        return Done({"sources": data.sizes(run.data)})


@dataclass(frozen=True)
class DataInspect(OnRun):
    """Shows decoded training examples of a config, with what is learned from marked.

    example: jaxlm data inspect quickstart --examples 3
    """

    examples: Count = 2
    """How many are shown."""

    def run(self, rest: list[str]) -> Done:
        run, start, _ = self.load(rest)
        from jaxlm.assembly import corpus, open_model
        from jaxlm.commands import dry_run

        objective = open_model.bound_objective(run, start)
        data = corpus.corpus(run.data, objective)
        print(*data.described(run.data), sep="\n")
        loader = corpus.training_loader(run, objective, data, None)
        examples = [loader.example(i) for i in range(self.examples)]
        for i, example in enumerate(examples):
            dry_run.show_example(example, objective.tokenizer, f"example {i}", dry_run.label_names(run.objective))
        return Done({"sources": data.sizes(run.data), "examples": examples})
