"""A prompt while it is read, chunk by chunk, into a row of its own."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxlm.inference.engine.answer import Answer

if TYPE_CHECKING:
    from jaxlm.inference.engine.rows import Rows


@dataclass
class Reading:
    """A prompt that is being read, for answers that begin alike."""

    answers: list[Answer]
    number: int
    tokens: tuple[int, ...]
    row: Any
    end: int
    """Tokens read so far."""
    first: int
    """Tokens of the first chunk at least: a prompt that is read both ways is read at once."""
    state: Any = None
    """States of the last chunk, and its tokens."""
    scores: list[tuple[float | None, dict[int, float] | None]] = field(default_factory=lambda: [(None, None)])

    @staticmethod
    def of(answers: list[Answer], number: int, rows: "Rows") -> "Reading":
        """Returns the reading of answers' prompt, which begins with what the prefix cache has of it."""
        request, tokens = answers[0].request, answers[0].text_so_far
        length = rows.length_for(len(tokens) + 1)
        pages: list[int] = []
        if rows.pages.count and request.prompt_logprobs is None:
            names = rows.pages.names(tokens[:-1], rows.salt(answers[0]))
            for answer in answers:
                pages = rows.pages.find(names)
                answer.pages = names[: len(pages)]
            rows.stats.prefix_queries += len(tokens)
            rows.stats.prefix_hits += len(pages) * rows.pages.size
        end = len(pages) * rows.pages.size
        if not answers[0].tokens:
            answers[0].answering.cached = end
        programs = rows.programs
        row = programs.load(rows.pool, pages, length) if pages else programs.empty(1, length)
        first = len(request.prompt) if programs.both_ways else 0
        return Reading(answers, number, tokens, row, end, first)
