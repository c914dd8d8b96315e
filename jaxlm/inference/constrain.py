"""The llguidance library says which tokens may come next where answers match a regular expression or a JSON schema."""

from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np

from jaxlm.core.errors import one_line
from jaxlm.data.tokenizer import carries_space, encode_after
from jaxlm.inference.sampling import Sampling


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "sampling.regex, sampling.json_schema: need llguidance, which is not installed; "
            "pip install 'jaxlm[generate]'"
        ) from None
    return llguidance


@dataclass(frozen=True)
class Grammar:
    """A grammar says what every answer must match, over one vocabulary. `end_ids` are the tokens that end an answer.

    `spaced` are the tokens that lose a space where a text begins with them, by their twins without it: these follow
    the vocabulary in `tokenizer`, and an empty one has None. Empty where no token does so.
    """

    tokenizer: Any
    grammar: str
    vocab: int
    end_ids: tuple[int, ...]
    spaced: dict[int, int | None]

    def start(self, after_text: bool = False) -> "Matcher":
        """Returns a matcher for a new answer, which follows a text or is one by itself."""
        return Matcher(self, after_text)


class Matcher:
    """A matcher follows one answer and says which tokens may come next."""

    def __init__(self, grammar: Grammar, after_text: bool) -> None:
        self.end_ids, self.vocab = list(grammar.end_ids), grammar.vocab
        self._twins = {} if after_text else grammar.spaced  # of the next token
        self._added = [twin for twin in grammar.spaced.values() if twin is not None and twin < grammar.vocab]
        self._matcher = _library().LLMatcher(grammar.tokenizer, grammar.grammar, log_level=0)

    @property
    def ended(self) -> bool:
        """Says whether nothing but an end token may follow."""
        return self._matcher.is_stopped()

    def take(self, id: int) -> None:
        """Adds a token to the answer; raises a ValueError where the grammar doesn't allow it."""
        twin, self._twins = self._twins.get(id, id), {}
        if twin is not None and not self._matcher.consume_token(twin):
            raise ValueError(f"the grammar does not go on with token {id}: {self._matcher.get_error()}")

    def allowed(self) -> np.ndarray:
        """Returns which tokens may come next, bool `[vocab]`: all of them once the answer has ended."""
        out = np.zeros(self.vocab, bool)
        if self.ended:
            return ~out
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the grammar can't go on: {self._matcher.get_error()}")
        n, possible = min(self.vocab, 8 * len(bits)), np.unpackbits(bits, bitorder="little")
        out[:n] = possible[:n]
        out[self._added] = False  # in the model's vocabulary these are rows of no token
        for id, twin in self._twins.items():
            out[id] = twin is None or possible[twin]
        out[self.end_ids] = self._matcher.is_accepting()
        return out


def open_grammar(tokens: Any, s: Sampling, vocab: int, end_ids: tuple[int, ...]) -> Grammar | None:
    """Returns the grammar of `s.regex` or `s.json_schema`, None where `s` has neither.

    Raises a ValueError that names the setting where it can't be parsed, or where no token ends an answer.
    """
    if s.regex is None and s.json_schema is None:
        return None
    if s.regex is not None and s.json_schema is not None:
        raise ValueError("sampling.regex, sampling.json_schema: give one of them")
    if not end_ids:
        raise ValueError("sampling.regex, sampling.json_schema: need a token that ends an answer; set stop_ids")
    llguidance = _library()
    name = "regex" if s.regex is not None else "json_schema"
    try:
        if s.regex is not None:
            grammar = llguidance.LLMatcher.grammar_from_regex(s.regex)
        else:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(s.json_schema)
    except ValueError as error:
        raise ValueError(f"sampling.{name}: {one_line(error)}") from None
    vocabulary, tokenizer = _read_vocabulary(tokens, end_ids[0])
    failed, notes = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    if failed:
        raise ValueError(f"sampling.{name}: {one_line(notes[0])}")
    return Grammar(tokenizer, grammar, vocab, end_ids, vocabulary.spaced)


@lru_cache(maxsize=4)  # a second or more for 50,000 tokens
def _read_vocabulary(tokens: Any, end: int) -> tuple["_Vocabulary", Any]:
    """Returns a tokenizer's vocabulary, whose texts end with the token `end`, and what llguidance makes of it."""
    llguidance, vocabulary = _library(), _Vocabulary(tokens, end)
    return vocabulary, llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), n_vocab=None)


class _Vocabulary:
    """A vocabulary answers what llguidance asks of a tokenizer."""

    def __init__(self, tokens: Any, end: int) -> None:
        silent = np.flatnonzero(np.asarray(tokens.bytes_per_token) == 0).tolist()
        self.tokens = list(tokens.token_bytes)
        self.eos_token_id, self.bos_token_id = end, None
        self.special_token_ids = sorted({*silent, end})
        self._encode = partial(encode_after, tokens)
        special = set(self.special_token_ids)
        self._ids = {text: i for i, text in enumerate(self.tokens) if text and i not in special}
        self._longest = max(map(len, self._ids), default=1)
        self.spaced: dict[int, int | None] = {}
        if carries_space(tokens):
            for i, text in enumerate(tokens.token_bytes):
                if text[:1] == b" " and i not in special and tokens.decode([i]).encode() == text[1:]:
                    self.spaced[i] = len(self.tokens) if text[1:] else None
                    self.tokens += [text[1:]] if text[1:] else []

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns tokens that spell exactly `text`, those of the tokenizer where they do."""
        wanted = text if isinstance(text, bytes) else text.encode()
        ids = self._encode(wanted.decode("utf-8", "replace"))
        return ids if b"".join(self.tokens[i] for i in ids) == wanted else self._spell(wanted)

    def _spell(self, text: bytes) -> list[int]:
        """Returns the longest tokens that spell bytes, from the left, as far as any do."""
        out: list[int] = []
        while text:
            sizes = range(min(self._longest, len(text)), 0, -1)
            size = next((n for n in sizes if text[:n] in self._ids), 0)
            if not size:
                break
            out.append(self._ids[text[:size]])
            text = text[size:]
        return out
