"""Says how large an engine's batches, caches and queue may become."""

from dataclasses import dataclass

from jaxlm.core.ranges import Count, Natural


@dataclass(frozen=True)
class Settings:
    """The settings say how much an engine does at once. Programs are compiled at its start for each of `rows` ×
    `lengths` and of `chunks` × `lengths`."""

    length: Count = 2048
    """The most tokens of a prompt and its answer together; a model with fewer positions allows no more than those."""
    rows: tuple[Count, ...] = (1, 4, 8, 16, 32)
    """Numbers of answers that a step of the model goes on with; the smallest that fits is used."""
    lengths: tuple[Count, ...] = ()
    """Numbers of slots of a row in the cache; the smallest that fits the longest row is used. Empty: `length` and,
    down to 256, each fourth part of the one before."""
    chunks: tuple[Count, ...] = (16, 64, 256)
    """Numbers of a prompt's tokens that are read at once."""
    read_tokens: Count = 512
    """Prompts are read between two steps of the answers that run, one chunk after the other, until so many tokens were
    read: more make batches full sooner, and running answers wait longer."""
    cache_tokens: Count | None = None
    """The most slots of all rows together: where a longer row needs more, those that came last wait. None: half of what
    the most rows at the longest of `lengths` would take, and at least what they take at the shortest."""
    page_tokens: Count = 16
    """Tokens of a page of the prefix cache, which keeps prompts and answers for prompts that begin as they do."""
    pages: Natural | None = None
    """Pages of the prefix cache; 0: none. None: a quarter of `cache_tokens`."""
    lookup: Natural = 0
    """Tokens that a greedy answer guesses ahead: those that followed its last two tokens before. One step of the model
    judges them, so that the answer stays the same; it pays where few rows run and texts repeat themselves."""
    source: Count = 512
    """The most tokens that an encoder reads."""
    queue: Count = 1024
    """The most answers that may wait; a request beyond is refused."""

    def row_lengths(self, limit: int) -> tuple[int, ...]:
        """Returns the numbers of slots that rows may have, in whole pages, for rows of up to `limit` tokens."""
        wanted = [min(n, limit) for n in self.lengths] or [limit]
        while not self.lengths and wanted[-1] > 256:
            wanted.append(max(256, wanted[-1] // 4))
        return tuple(sorted({-(-n // self.page_tokens) * self.page_tokens for n in {*wanted, limit}}))

    def most_tokens(self, lengths: tuple[int, ...]) -> int:
        """Returns the most slots of all rows together. Raises ValueError where the longest row doesn't fit."""
        if self.cache_tokens is None:
            most = max(self.rows)
            return max(most * lengths[0], most * lengths[-1] // 2, min(self.rows) * lengths[-1])
        if self.cache_tokens < min(self.rows) * lengths[-1]:
            raise ValueError(
                f"cache_tokens: {self.cache_tokens} do not hold {min(self.rows)} row(s) of {lengths[-1]} "
                "tokens; raise it, or lower length"
            )
        return self.cache_tokens
