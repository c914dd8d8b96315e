"""Decodes and encodes what follows a text after it: alone, its first token would lose its space."""

from collections.abc import Sequence

from jaxlm.data.tokenizer.interface import Tokenizer

UNFINISHED = "\ufffd"  # tokenizers decode to it bytes that are no whole character (yet)
PROBES = ("\n", "a", "0", ".", "(", "é", "中")  # of which a vocabulary has at least one as a token
CONTEXT = 16  # tokens: what is decoded before new ones need only hold a whole character or word


def carries_space(tokens: Tokenizer) -> bool:
    """Says whether the first token of a text has a space before it that isn't in the text, as Llama 2's and T5's do."""
    special = tokens.bytes_per_token == 0
    for text in PROBES:
        ids = tokens.encode(text)
        if ids and not special[ids].any():
            return tokens.token_bytes[ids[0]][:1] == b" "
    return False


def encode_after(tokens: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text that goes on from another, so that its first token carries no space of its own."""
    if not text or not carries_space(tokens):
        return tokens.encode(text)
    found = []
    for before in PROBES:
        known, ids = tokens.encode(before), tokens.encode(before + text)
        if known and len(known) < len(ids) and ids[: len(known)] == known:
            found.append(ids[len(known) :])
    exact = (ids for ids in found if b"".join(tokens.token_bytes[i] for i in ids) == text.encode())
    return next(exact, next(iter(found), tokens.encode(text)))


def context(tokens: Tokenizer, before: Sequence[int]) -> list[int]:
    """Returns as many of the last tokens of `before` as decide how the next ones are decoded.

    They end where special tokens begin a text anew: there the first token carries a space once more.
    """
    ids = [int(id) for id in before if id < tokens.vocab_size]
    special = tokens.bytes_per_token == 0
    if carries_space(tokens) and (marks := [i for i, id in enumerate(ids) if special[id]]):
        starts = [tokens.encode(text) for text in PROBES]
        anew = [tokens.encode_special(tokens.piece(ids[marks[-1]]) + text) for text in PROBES]
        if all(found[-len(start) :] == start for found, start in zip(anew, starts, strict=True) if start):
            ids = ids[marks[-1] + 1 :]
    first = max(0, len(ids) - CONTEXT)
    while first and (special[ids[first]] or tokens.decode([ids[first]])[:1] in ("", UNFINISHED)):
        first -= 1  # not in the middle of a character that is several tokens
    return ids[first:]


def decode_after(tokens: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """Returns the text that `ids` add to that of `before`: the two together are what all decode to.

    A character that `before` leaves unfinished is part of what is added.
    """
    kept = context(tokens, before)
    known = tokens.decode(kept).rstrip(UNFINISHED)
    return tokens.decode([*kept, *ids])[len(known) :]
