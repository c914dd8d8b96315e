"""Records are cut from a token cache by arithmetic alone: any record can be read at any time, in any order."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np

from jaxlm.data.token_cache import Cache


class Records(Protocol):
    """Records have a length, and items that an objective makes examples of."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Any: ...


class Window(TypedDict):
    """A window is a run of T + 1 tokens of a corpus."""

    tokens: np.ndarray
    """int32 [T + 1]."""
    segments: np.ndarray
    """int32 [T + 1]: 1, 2, … for each document in the window, 0 for padding."""
    positions: np.ndarray
    """int32 [T + 1]: from 0 in each segment."""


class Pair(TypedDict):
    """A pair is two runs of tokens for next-sentence prediction."""

    first: np.ndarray
    """int32 [a]."""
    second: np.ndarray
    """int32 [b]."""
    is_next: np.integer
    """1 if `second` follows `first` in its document, else 0."""


class TextRow(TypedDict):
    """A text row holds pairs of texts."""

    tokens: np.ndarray
    """int32: the pairs as the cache has them, `[bos] first [eos] second [eos]` each."""
    lengths: np.ndarray
    """int32 [pairs, 2]: tokens of each pair's two texts."""


@runtime_checkable
class DrawnRecords(Records, Protocol):
    """Drawn records have a random part: each epoch draws them differently."""

    def draw(self, i: int, rng: np.random.Generator) -> Any:
        """Returns record i as drawn by `rng`."""


# -------------------------------------------------------------------------------------------------------------- packed


@dataclasses.dataclass(frozen=True)
class Packed:
    """Windows of a token stream: window i covers positions i*T to i*T + T inclusive; see `packed`."""

    cache: Cache
    seq_len: int
    document_mask: bool

    def __len__(self) -> int:
        return -(-(len(self.cache.tokens) - 1) // self.seq_len)

    def __getitem__(self, i: int) -> Window:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        length = self.seq_len + 1
        start = i * self.seq_len
        window = self.cache.tokens[start : start + length]
        count = len(window)
        tokens = np.full(length, self.cache.pad_id, np.int32)
        tokens[:count] = window
        segments = np.zeros(length, np.int32)
        positions = np.zeros(length, np.int32)
        if self.document_mask:
            offsets = self.cache.offsets
            first, last = np.searchsorted(offsets, (start, start + count - 1), side="right") - 1
            # A document that goes on from the window before counts as one that begins here.
            begins = np.maximum(offsets[first : last + 1] - start, 0)
            lengths = np.diff(begins, append=count)
            segments[:count] = np.repeat(np.arange(1, len(begins) + 1, dtype=np.int32), lengths)
            positions[:count] = np.arange(count, dtype=np.int32) - np.repeat(begins, lengths)
        else:
            segments[:count] = 1
            positions[:count] = np.arange(count, dtype=np.int32)
        return Window(tokens=tokens, segments=segments, positions=positions)


def packed(cache: Cache, seq_len: int, *, document_mask: bool = True) -> Packed:
    """Concatenates the documents and splits them into windows of seq_len + 1 tokens.

    Windows overlap by one token, so that every token but the first is a target once. Without
    `document_mask` a window is one segment.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    return Packed(cache, seq_len, document_mask)


# --------------------------------------------------------------------------------------------------------------- pairs


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs split each stretch of a corpus in two; see `pairs`."""

    cache: Cache
    length: int
    seed: int
    documents: np.ndarray  # int64 [usable], those with at least two tokens between bos and eos
    ends: np.ndarray  # int64 [usable], stretches up to and including each usable document

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> Pair:
        """Returns the pair that never changes, for validation."""
        return self.draw(i, np.random.Generator(np.random.Philox(key=(self.seed << 64) | i)))

    def draw(self, i: int, rng: np.random.Generator) -> Pair:
        """Draws where a pair is split, and what comes second."""
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        which = int(np.searchsorted(self.ends, i, side="right"))
        begin, end = self._body(which)
        earlier = int(self.ends[which - 1]) if which else 0
        stretches, number = int(self.ends[which]) - earlier, i - earlier
        start = begin + number * (end - begin) // stretches
        stop = begin + (number + 1) * (end - begin) // stretches
        split = start + int(rng.integers(1, stop - start))
        is_next = bool(rng.random() < 0.5)
        second = self.cache.tokens[split:stop]
        if not is_next:
            other = int(rng.integers(len(self.documents) - 1))
            begin, end = self._body(other + (other >= which))
            size = min(stop - split, end - begin)  # as long as the true one, or length would tell the answer
            offset = int(rng.integers(begin, end - size + 1))
            second = self.cache.tokens[offset : offset + size]
        first = self.cache.tokens[start:split]
        return Pair(first=first.astype(np.int32), second=second.astype(np.int32), is_next=np.int32(is_next))

    def _body(self, which: int) -> tuple[int, int]:
        """Returns the stream positions (begin, end) of a usable document without its bos and eos."""
        document = self.documents[which]
        return int(self.cache.offsets[document]) + 1, int(self.cache.offsets[document + 1]) - 1


def pairs(cache: Cache, length: int, seed: int = 0) -> Pairs:
    """Cuts documents into pairs for next-sentence prediction, of at most `length` tokens together.

    Half of the time `second` follows `first` in its document, else it comes from a random place in another document.
    Raises ValueError if there are fewer than two documents that can be split.
    """
    if length < 4:
        raise ValueError(f"length={length} must be at least 4, so that every stretch splits in two")
    bodies = np.diff(cache.offsets) - 2
    documents = np.flatnonzero(bodies >= 2)
    if len(documents) < 2:
        raise ValueError(
            f"pairs need two documents of at least 2 tokens, {cache.path} has {len(documents)}: give more documents"
        )
    return Pairs(cache, length, seed, documents, np.cumsum(-(-bodies[documents] // length)))


# --------------------------------------------------------------------------------------------------------------- texts


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts share rows: row i holds pairs `firsts[i]` to `firsts[i + 1]` of the cache; see `texts`."""

    cache: Cache
    lengths: np.ndarray  # int32 [pairs, 2], tokens of each pair's two texts
    firsts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, i: int) -> TextRow:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        begin, end = self.firsts[i : i + 2]
        offsets = self.cache.offsets
        tokens = self.cache.tokens[offsets[begin] : offsets[end]].astype(np.int32)
        return TextRow(tokens=tokens, lengths=self.lengths[begin:end])


def text_lengths(cache: Cache, eos_id: int) -> np.ndarray:
    """Returns int32 [pairs, 2]: the lengths of the two texts of each `[bos] first [eos] second [eos]` of a cache.

    Raises ValueError if the cache holds other documents.
    """
    begins, ends = cache.offsets[:-1], cache.offsets[1:] - 1
    is_eos = np.asarray(cache.tokens) == eos_id
    is_eos[begins] = is_eos[ends] = False  # bos may be eos
    middles = np.flatnonzero(is_eos)
    if len(middles) != len(begins) or not ((begins < middles) & (middles < ends)).all():
        raise ValueError(f"{cache.path} holds no pairs of texts: delete {cache.path.parent} and prepare the data again")
    return np.stack([middles - begins - 1, ends - middles - 1], 1).astype(np.int32)


def texts(cache: Cache, lengths: np.ndarray, takes: np.ndarray, rooms: tuple[int, int], *, pack: bool = True) -> Texts:
    """Puts as many neighbouring pairs into a row as fit: pair i takes `takes[i]` [2] of a row's two `rooms`."""
    assert (takes <= np.array(rooms)).all()
    if not pack:
        return Texts(cache, lengths, np.arange(len(lengths) + 1))
    firsts, a, b = [0], 0, 0
    for i, (first, second) in enumerate(takes.tolist()):
        if a + first > rooms[0] or b + second > rooms[1]:
            firsts.append(i)
            a = b = 0
        a, b = a + first, b + second
    return Texts(cache, lengths, np.array([*firsts, len(takes)]))


# ------------------------------------------------------------------------------------------------------------- batches


BY_POSITION = frozenset({
    "tokens", "segments", "positions", "types", "prefix", "source", "source_segments", "source_positions", "targets",
    "weights", "allowed", "origin", "unit", "checksum",
})  # fmt: skip
"""Keys of a batch that have a number for each position: how long the others are says nothing of what they hold."""


BY_TEXT = frozenset({"at", "target", "rows"})
"""Keys of a batch that have a value for a text, where each row is one text: `[micro, rows, …]`. Where rows are shared,
they have one for each of a row's places for texts: `[micro, rows, texts_in_row(T), …]`."""
BY_PLACE = frozenset({"teacher_values", "teacher_classes", "teacher_rest"})
"""Keys that have a value for each place of a row: `[micro, rows, 1, …]` where each row is one text, and
`[micro, rows, texts_in_row(T), …]` where rows are shared."""
SHORTEST = 32
"""Rows that texts share aren't made shorter than this."""


def texts_in_row(room: int) -> int:
    """Returns how many texts with values of their own (`BY_TEXT`) share a row of `room` tokens at most. It depends on
    nothing else, so that batches have few shapes."""
    return max(1, room // 8)


def first_fit(lengths: Sequence[int], room: int, most: int | None = None) -> list[list[int]]:
    """Assigns texts to rows of `room` tokens, the longest first; returns the indices of the texts in each row, of which
    there are at most `most`.

    A text goes to the first row that has room for it, which a tree of the most room left finds in log2(texts) steps.
    """
    assert most is None or min(lengths, default=1) > 0, "a text without tokens fits into a row that is full"
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    left = [room] * (2 * leaves)  # node i has children 2i and 2i + 1; its leaves are rows, most of which stay empty
    out: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        n, node = min(lengths[i], room), 1
        while node < leaves:
            node = 2 * node if left[2 * node] >= n else 2 * node + 1
        if node - leaves == len(out):
            out.append([])
        members = out[node - leaves]
        members.append(i)
        left[node] = 0 if len(members) == most else left[node] - n
        while node > 1:
            node //= 2
            left[node] = max(left[2 * node], left[2 * node + 1])
    return out


def concatenated(texts: Sequence[np.ndarray], room: int, pad: int) -> Window:
    """Puts texts one after another into `room` tokens, each a segment of its own with positions from 0."""
    lengths = [len(text) for text in texts]
    n = sum(lengths)
    assert n <= room, f"{n} tokens for {room} positions"

    def fill(parts: Sequence[np.ndarray], value: int) -> np.ndarray:
        return np.concatenate([*parts, np.full(room - n, value)]).astype(np.int32)

    return Window(
        tokens=fill(texts, pad),
        segments=fill([np.full(k, i) for i, k in enumerate(lengths, 1)], 0),
        positions=fill([np.arange(k) for k in lengths], 0),
    )


def shared_rows(batch: dict[str, np.ndarray], room: int, micro: int = 0) -> list[list[int]]:
    """Returns which rows of a batch `[micro, rows, T]`, each of them one text, would share a row of `room` tokens."""
    lengths = (batch["segments"][micro] > 0).sum(-1)
    if BY_TEXT.isdisjoint(batch):
        return first_fit(lengths.tolist(), room)
    return first_fit(np.maximum(lengths, 1).tolist(), room, texts_in_row(room))


def pack_batch(
    batch: dict[str, np.ndarray], ways: int = 1, parts: int = 1, *, halved: bool = True
) -> dict[str, np.ndarray]:
    """Packs a batch `[micro, rows, T]` of one text a row into as few rows as hold them, each text a segment; see
    `layout`.

    The number of rows is a multiple of `ways`. Texts of unlike `parts` of the rows, one part after another, share none,
    and parts stay as large as each other: workers that train apart keep the texts that they had.
    """
    micro = len(batch["segments"])
    apart = {name: leaf.reshape(micro * parts, -1, *leaf.shape[2:]) for name, leaf in batch.items()}
    packed = share_rows(apart, *layout(apart, -(-ways // parts), halved=halved))
    return {name: leaf.reshape(micro, -1, *leaf.shape[2:]) for name, leaf in packed.items()}


def layout(
    batch: dict[str, np.ndarray], ways: int = 1, *, halved: bool = True
) -> tuple[int, list[list[list[int]]], int]:  # fmt: skip
    """Returns what `share_rows` takes: the length of the rows, their texts by micro-batch, and the number of rows.

    The number is rounded up (`padded_count`), so that few shapes are compiled; the rows added are padding. With
    `halved` rows are half as long as the batch's, or a quarter and so on, where that saves a fifth of all positions:
    few texts fill no long rows.
    """
    longest, room = int(np.max((batch["segments"] > 0).sum(-1))), batch["segments"].shape[-1]
    best: tuple[int, list[list[list[int]]], int] | None = None
    while best is None or room >= max(longest, SHORTEST):
        rows = [shared_rows(batch, room, m) for m in range(len(batch["segments"]))]
        count = padded_count(max(map(len, rows)), ways)
        if best is None or count * room < 0.8 * best[0] * best[2]:
            best = room, rows, count
        if room % 2 or not halved:
            break
        room //= 2
    return best


def padded_count(count: int, ways: int = 1) -> int:
    """Returns a number of rows rounded up to one of four sizes between two powers of 2, and to a multiple of `ways`."""
    step = max(1, (1 << max(count - 1, 1).bit_length()) // 8)
    return -(-(-(-count // step) * step) // ways) * ways


def share_rows(
    batch: dict[str, np.ndarray], room: int, rows: Sequence[list[list[int]]], count: int
) -> dict[str, np.ndarray]:
    """Puts texts into shared rows: `rows[m][r]` are the rows of the batch `[micro, rows, T]` that row r of the new one
    `[micro, count, room]` holds, as its segments 1, 2, …"""
    lengths, K = (batch["segments"] > 0).sum(-1), texts_in_row(room)
    out = {}
    for name, leaf in batch.items():
        shape = (K, *leaf.shape[2:]) if name in BY_TEXT else (K, *leaf.shape[3:]) if name in BY_PLACE else (room,)
        out[name] = np.zeros((len(rows), count, *shape), leaf.dtype)
    for m, micro_rows in enumerate(rows):
        for r, members in enumerate(micro_rows):
            at = 0
            for k, i in enumerate(members):
                n = lengths[m, i]
                for name, leaf in batch.items():
                    if name in BY_TEXT | BY_PLACE:
                        own = leaf[m, i, 0] if name in BY_PLACE else leaf[m, i]
                        out[name][m, r, k] = own + at if name == "at" else own
                    else:
                        out[name][m, r, at : at + n] = leaf[m, i, :n]
                out["segments"][m, r, at : at + n] = k + 1
                at += n
    return out


def trim_padding(batch: dict[str, np.ndarray], multiple: int = 32) -> dict[str, np.ndarray]:
    """Cuts off the columns of a batch `[micro, rows, …, T]` that are padding in every row, down to a `multiple`."""
    segments = batch["segments"]
    n = -(-max(1, int(np.max((segments > 0).sum(-1)))) // multiple) * multiple
    return {name: leaf[..., :n] if name in BY_POSITION else leaf for name, leaf in batch.items()}
