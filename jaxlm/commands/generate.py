"""`jaxlm generate`, `jaxlm chat` and `jaxlm embed` make text and vectors with a model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from jaxlm.commands.arguments import Command, Done, Flag, Model, More, start_processes
from jaxlm.core import typed_arguments
from jaxlm.core.config import CacheKind
from jaxlm.core.ranges import Count, Natural

Texts = UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True)
class OnModel(Command):
    """An OnModel command makes text with a model: every field of `Sampling` is an option too."""

    takes_more = True
    model: Model

    @classmethod
    def more(cls, place: str, rest: Sequence[str] = ()) -> More | None:
        from jaxlm.assembly import generation_advice, model_source
        from jaxlm.inference.sampling import Sampling

        own = generation_advice.advice(model_source.describe(place)).sampling if place else Sampling()
        return More("sampling", Sampling, own)

    def chosen(self, rest: list[str]) -> tuple[Any, Any]:
        """Returns the described model, and its own settings with those of the options; tells which are followed."""
        from jaxlm.assembly import generation_advice, model_source
        from jaxlm.inference.sampling import Sampling

        source = model_source.describe(self.model)
        own = generation_advice.advice(source)
        how = own.changed(typed_arguments.parse(Sampling, rest, own.sampling))
        own.tell(how)
        return source, how


@dataclass(frozen=True)
class Generate(OnModel):
    """Continues prompts with text that the model writes.

    example: jaxlm generate runs/quickstart --prompt 'def main(' --temperature 0.8
    """

    prompt: Texts = ()
    """Text to continue."""
    draft: Annotated[str | None, arg(metavar="MODEL|lookup")] = None
    """A smaller model of the same tokenizer proposes tokens, or what was said before does: the same text, sooner."""
    adapter: Annotated[Texts, arg(metavar="DIR|-")] = ()
    """Of each prompt in turn, PEFT's files or none: one batch goes through several adapters."""
    proposals: Count = 4
    """Tokens that the draft proposes at a time."""
    special: Flag = False
    """Reads special tokens that a prompt spells, such as <|im_start|>, as such and not as characters."""
    cache: CacheKind | None = None
    """How keys and values of tokens that were read are stored, such as int8; None: as the run says, or as computed."""
    step: Natural | None = None
    """The checkpoint's; None: the newest."""

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import generate_text, open_model
        from jaxlm.training.log import shown

        source, how = self.chosen(rest)
        if not self.prompt:
            raise ValueError("give a --prompt")
        more: dict[str, Any] = dict(draft=self.draft, proposals=self.proposals, adapters=self.adapter,
                                    special=self.special)  # fmt: skip
        place = open_model.with_cache(source, self.cache)
        found = generate_text.generate(place, self.prompt, how, self.step, **more)
        for prompt, answers in zip(self.prompt, found, strict=True):
            for answer in answers:
                print(shown(prompt, answer.text, generate_text.goes_on(source)))
        texts = [[a.text for a in answers] for answers in found]
        values: dict[str, Any] = {"prompts": self.prompt, "texts": texts if how.samples > 1 else [t for [t] in texts]}
        values["reasons"] = [[a.completion.reason for a in answers] for answers in found]
        if how.logprobs is not None:
            values["logprobs"] = [[a.completion.logprobs for a in answers] for answers in found]
            values["likeliest"] = [[a.completion.top for a in answers] for answers in found]
        return Done(values)


@dataclass(frozen=True)
class Chat(OnModel):
    """Talks with a model: /reset forgets, /exit ends, Ctrl-C ends an answer.

    example: jaxlm chat runs/tuned --system 'Answer in one line.'
    """

    system: str | None = None
    """What the model is told first."""
    template: Path | None = None
    """A chat template in Jinja; None: the model's own."""
    cache: CacheKind | None = None
    """How keys and values of tokens that were read are stored, such as int8; None: as the run says, or as computed."""
    step: Natural | None = None
    """The checkpoint's; None: the newest."""

    def run(self, rest: list[str]) -> Done:
        start_processes(self)
        from jaxlm.assembly import generate_text, open_model

        def say(text: str) -> None:
            print(text, end="", flush=True)

        (source, how), prompt = self.chosen(rest), "> " if sys.stdin.isatty() else ""
        more: dict[str, Any] = dict(system=self.system, template=self.template, step=self.step, prompt=prompt)
        place = open_model.with_cache(source, self.cache)
        return Done({"messages": generate_text.chat(place, iter(sys.stdin.readline, ""), say, how, **more)})


@dataclass(frozen=True)
class Embed(Command):
    """Turns texts into vectors with an encoder.

    example: jaxlm embed all-MiniLM-L6-v2 --text 'A man is eating food.' --out vectors.npy
    """

    model: Model
    text: Texts = ()
    """A text."""
    file: Path | None = None
    """A file with one text a line."""
    pooling: Literal["mean", "cls"] | None = None
    """None: what the model's files say, or mean."""
    out: Path | None = None
    """The new .npy file: float32, one row a text."""

    def run(self, rest: list[str]) -> Done:
        from jaxlm.data.text_input import read_lines

        lines = [line for _, line in read_lines(self.file)] if self.file else []
        texts = [*self.text, *(lines if lines and lines[-1] else lines[:-1])]  # the last line's end begins no text
        if not texts:
            raise ValueError(
                f"file: {self.file} holds no text" if self.file else "embed: no text; give --text or --file"
            )
        start_processes(self)
        import numpy as np

        from jaxlm.assembly import generate_text

        vectors = generate_text.embed(self.model, texts, self.pooling)
        if self.out:
            np.save(self.out, vectors)
            print(f"{self.out}: {vectors.shape[0]} vectors of {vectors.shape[1]}")
            return Done({"out": self.out, "shape": vectors.shape})
        for text, vector in zip(texts, vectors, strict=True):
            print(f"{text}\t{' '.join(f'{x:.6f}' for x in vector)}")
        return Done({"texts": texts, "vectors": vectors})
