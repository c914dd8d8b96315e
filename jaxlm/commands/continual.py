"""`jaxlm continual` trains a stream of tasks or texts one after another."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxlm.commands.arguments import Command, Done
from jaxlm.core import config_io

_CONFIG = "a config file whose config() returns a Stream, or the name of one of the package"


@dataclass(frozen=True)
class Continual(Command):
    """Trains the stages of a stream one after another, scores each model on every stage, and reports what was learned,
    kept and transferred; the same command continues an interrupted stream. Every field of a config is an option too,
    for all stages.

    example: jaxlm continual three_languages --continual.methods replay ewc
    """

    takes_more = True

    config: Annotated[Positional[str], arg(metavar="CONFIG", help=_CONFIG)]

    def run(self, rest: list[str]) -> Done:
        file = Path(config_io.find(self.config))
        from jaxlm.assembly import stream
        from jaxlm.core.stream import Stream
        from jaxlm.training import stream_report
        from jaxlm.weights.adapters import METHODS

        made = config_io.load_kind(file, Stream)
        made = dataclasses.replace(made, run=config_io.override(*config_io.choose_adapter(made.run, rest, METHODS)))
        if status := stream.train(made):
            return Done({}, status)
        results, page = stream_report.build(made.run.folder)
        print(stream_report.table(results))
        print(f"report: {page}")
        return Done(results)
