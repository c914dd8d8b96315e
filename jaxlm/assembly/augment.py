"""Labelled examples are augmented: words are replaced by what a masked language model would write in their place
(Kobayashi 2018, Wu et al. 2019), or texts are translated to another language and back (Sennrich et al. 2016). Labels
stay.

B rows, T positions, K masked places of a row, V vocabulary.
"""

import csv
import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.assembly.open_model import Pretrained, open_model
from jaxlm.data.labelled import conll, tables
from jaxlm.data.text_input import read_text
from jaxlm.evaluation.metrics import is_spans
from jaxlm.inference import stream
from jaxlm.inference.sampling import Sampling
from jaxlm.models.model import Model
from jaxlm.nn import losses
from jaxlm.runtime import mesh

ROWS = 16
WORD = re.compile(r"[^\W\d_]+")
NO_BREAK = "\u00a0"  # stands for a blank within a word of a CoNLL file, where blanks divide words
Spans = list[tuple[int, int]]


@dataclass
class Item:
    """An example, and the changes that make a new one of it."""

    text: str
    spans: Spans
    """The words that may be replaced, by their characters."""
    cells: dict[str, Any] = field(default_factory=dict)
    """The cells, if it is a row of a table."""
    lines: list[list[str]] = field(default_factory=list)
    """The lines, if it is a sentence in columns."""
    masked: Spans = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    """The new text at each of `masked`."""

    def changed(self) -> str:
        """Returns the new text."""
        out, at = [], 0
        for (start, end), new in zip(self.masked, self.new, strict=True):
            out += [self.text[at:start], new]
            at = end
        return "".join(out) + self.text[at:]


def augment(
    source: str, out: Path, method: str, model: str, back: str | None = None, *, text: str = "text",
    columns: Sequence[str] = (), word: int = 0, tag: int = -1, entities: bool = False, share: float = 0.15,
    top_k: int = 10, copies: int = 1, prefixes: Sequence[str] = ("", ""), how: Sampling | None = None, seed: int = 0,
) -> str:  # fmt: skip
    """Writes new examples of `source`, in its format, to `out`; returns a line on what became of them.

    `text`: column of a table; `word`, `tag`: of CoNLL files, where words of entities stay unless `entities`. `share` of
    the words are replaced, each by one of the `top_k` likeliest others. `prefixes`: of what the two translators read.
    """
    path = Path(source).expanduser()
    table = path.suffix.lower() in tables.READERS
    _check(path, out, method, back, table, share, top_k, copies)
    items = _rows(source, columns, text) if table else _sentences(source, word, tag, entities)
    if not items:
        raise ValueError(f"augment: {source} holds no example; name a file that has some")
    if method == "mask":
        made, said = _masked(open_model(model), items, share, top_k, copies, seed)
    else:
        assert back is not None
        made, said = _translated(model, back, items, prefixes, how or Sampling(), copies, seed)
    if not made:
        raise ValueError(f"augment: nothing new came of {source}: {said}")
    _write(out, path, made, columns, text, table, word)
    return f"{out}: {len(made):,} new of {len(items):,} examples; {said}; seed {seed}"


def _check(
    path: Path, out: Path, method: str, back: str | None, table: bool, share: float, top_k: int, copies: int
) -> None:
    if out.exists():
        raise ValueError(f"out: {out} is there already and is never overwritten; choose another name")
    if not path.is_file():
        raise ValueError(f"augment: {path} does not exist: give a file of a table or of CoNLL columns")
    if out.suffix.lower() != path.suffix.lower() or path.suffix.lower() == ".json":
        kinds = "a .csv, .tsv or .jsonl table or CoNLL columns"
        raise ValueError(f"out: the new file has the format of the old one, {kinds}; name it *{path.suffix}")
    if method == "back_translate" and (back is None or not table):
        why = "needs `back`, a model that translates back" if table else "would lose the tags of words; use mask"
        raise ValueError(f"method: back_translate {why}")
    if not 0 < share <= 1 or top_k < 1 or copies < 1:
        raise ValueError("augment: `share` is above 0 and at most 1, `top_k` and `copies` at least 1")


# ------------------------------------------------------------------------------------------------------------ the files


def _rows(source: str, columns: Sequence[str], text: str) -> list[Item]:
    out = []
    for row in tables.read(source, columns):
        content = row.text(text, "`text`")
        out.append(Item(content, [m.span() for m in WORD.finditer(content)], cells=row.cells))
    return out


def _sentences(source: str, word: int, tag: int, entities: bool) -> list[Item]:
    """Words of entities are those whose tag is not O, where tags mark spans."""
    examples = conll.read(source, word, tag).examples  # which says what is wrong with the file
    spans = is_spans(sorted({tag for e in examples for tag in e.tags}))
    out: list[Item] = []
    lines: list[list[str]] = []
    for cells in [*(cells for _, cells in conll.lines(Path(source).expanduser())), []]:
        if cells and not cells[0].startswith(conll.DOCUMENT):
            lines.append(cells)
        elif lines:
            out.append(_sentence(lines, word, tag, spans and not entities))
            lines = []
    return out


def _sentence(lines: list[list[str]], word: int, tag: int, keep: bool) -> Item:
    free, at = [], 0
    for cells in lines:
        end = at + len(cells[word])
        if WORD.fullmatch(cells[word]) and not (keep and cells[tag] != "O"):
            free.append((at, end))
        at = end + 1
    return Item(" ".join(cells[word].replace(" ", NO_BREAK) for cells in lines), free, lines=lines)


def _write(
    out: Path, path: Path, items: Sequence[Item], columns: Sequence[str], text: str, table: bool, word: int
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [item.cells | {text: item.changed()} for item in items] if table else []
    with open(out, "x", encoding="utf-8", newline="") as file:
        if not table:
            apart = "\t" if "\t" in read_text(path) else " "
            for item in items:
                for line, new in zip(item.lines, item.changed().split(" "), strict=True):
                    changed = [*line]
                    changed[word] = line[word] if " " in line[word] else new
                    file.write(apart.join(changed) + "\n")
                file.write("\n")
        elif out.suffix.lower() == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif out.suffix.lower() == ".csv":
            lines = csv.writer(file, lineterminator="\n")
            lines.writerows([] if columns else [list(rows[0])])
            lines.writerows(row.values() for row in rows)
        else:  # cells can hold neither tabs nor line breaks
            named = [] if columns else [list(rows[0])]
            for cells in [*named, *(row.values() for row in rows)]:
                file.write("\t".join(" ".join(str(cell).split("\t")) for cell in cells).replace("\n", " ") + "\n")


# ------------------------------------------------------------------------------------------------- words by their place


def _masked(
    p: Pretrained, items: Sequence[Item], share: float, top_k: int, copies: int, seed: int
) -> tuple[list[Item], str]:
    model, tokens = p.model, p.tokens
    if model.family.kind != "encoder" or not model.config.head or tokens.mask_id is None:
        raise ValueError(
            f"model: {p.source.path} fills no masks; `method` mask needs an encoder with a language-model head and a "
            f"mask token, such as BERT"
        )
    allowed_V = whole_words(tokens, model.config.vocab)
    if allowed_V.sum() <= top_k:
        raise ValueError(f"top_k: only {allowed_V.sum()} tokens of the model are whole words; give a smaller number")
    made: list[Item] = []
    with mesh.on_mesh(p.mesh):
        guess = jax.jit(partial(_guess, model, min(top_k + 1, int(allowed_V.sum()))))
        for copy in range(copies):
            drawn = [_chosen(item, p, share, np.random.default_rng([seed, copy, i])) for i, item in enumerate(items)]
            order = sorted((i for i, (_, at, _) in enumerate(drawn) if at), key=lambda i: len(drawn[i][0]))
            for first in range(0, len(order), ROWS):
                members = order[first : first + ROWS]
                batch = _padded([drawn[i][:2] for i in members], jax.device_count())
                guesses = jax.device_get(guess(p.params, jnp.asarray(allowed_V), batch))
                for row, i in enumerate(members):
                    _, at, item = drawn[i]
                    rng = np.random.default_rng([seed, copy, i, 1])
                    pairs = zip(item.masked, *(x[row, : len(at)] for x in guesses), strict=True)
                    item.new = [_word(tokens, item.text[a:b], z, ids, top_k, rng) for (a, b), z, ids in pairs]
            made += [item for _, at, item in drawn if at]
    replaced, words = sum(len(item.masked) for item in made), sum(len(item.spans) for item in made)
    return made, f"{replaced:,} of their {words:,} words that may be replaced were, top-k {top_k}"


def whole_words(tokens: Any, vocab: int) -> np.ndarray:
    """Returns which tokens are a word of letters, as it is written after a space: `[V]`."""
    texts = [tokens.decode([i]).strip() for i in range(tokens.vocab_size)]
    some = [i for i, text in enumerate(texts) if WORD.fullmatch(text)]
    out = np.zeros(vocab, bool)
    for i, ids in zip(some, tokens.encode_batch([f" {texts[i]}" for i in some]), strict=True):
        out[i] = list(ids) == [i]
    return out


def _chosen(item: Item, p: Pretrained, share: float, rng: np.random.Generator) -> tuple[list[int], list[int], Item]:
    """Returns the tokens with each chosen word as one mask, the masks' positions, and the example with the choice."""
    tokens = p.tokens
    before = [tokens.bos_id if tokens.cls_id is None else tokens.cls_id]
    after = [tokens.eos_id if tokens.sep_id is None else tokens.sep_id]
    ids, places = tokens.encode_offsets(item.text)
    room = (p.model.config.positions or 1 << 30) - len(before) - len(after)
    ids, places = ids[:room], places[:room]
    starts = {a: i for i, (a, b) in reversed(list(enumerate(places))) if b > a}
    ends = {b: i for i, (a, b) in enumerate(places) if b > a}
    free = [(a, b) for a, b in item.spans if a in starts and b in ends]  # words that are tokens of their own
    if not free:
        return [], [], item
    wanted = max(1, round(share * len(free)))
    chosen = sorted(free[i] for i in rng.choice(len(free), wanted, replace=False))
    out, at, last = list(before), [], 0
    for a, b in chosen:
        out += ids[last : starts[a]]
        at.append(len(out))
        out.append(tokens.mask_id)
        last = ends[b] + 1
    return [*out, *ids[last:], *after], at, dataclasses.replace(item, masked=chosen)


def _padded(rows: Sequence[tuple[list[int], list[int]]], ways: int) -> dict[str, np.ndarray]:
    """Returns rows padded to one of few sizes, so that few programs are compiled."""
    size = lambda n, least: max(least, 1 << (n - 1).bit_length())  # noqa: E731
    B, T = -(-ROWS // ways) * ways, size(max(len(ids) for ids, _ in rows), 16)
    out = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions", "segments")}
    out["at"] = np.zeros((B, size(max(len(at) for _, at in rows), 4)), np.int32)
    for i, (ids, at) in enumerate(rows):
        out["tokens"][i, : len(ids)], out["segments"][i, : len(ids)] = ids, 1
        out["positions"][i, : len(ids)], out["at"][i, : len(at)] = np.arange(len(ids)), at
    return out


def _guess(model: Model, k: int, params: Any, allowed_V: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Computes the logits and ids `[B, K, k]` of the likeliest words at each masked place."""
    batch = {name: model.shard(x, "batch", None) for name, x in batch.items()}
    at_BK = batch.pop("at")
    x_BTD = model.shard(model.forward(params, batch).x_BTD, "batch", None, None)
    x_BKD = jnp.take_along_axis(x_BTD, at_BK[..., None], axis=1)
    z_BKV = losses.logits(model.readout(params, model.shard(x_BKD, "batch", None, None)), model.shard)
    z_BKV = model.shard(z_BKV, "batch", None, None)
    return jax.lax.top_k(jnp.where(allowed_V[None, None], z_BKV, -jnp.inf), k)


def _word(tokens: Any, old: str, z_k: np.ndarray, ids_k: np.ndarray, top_k: int, rng: np.random.Generator) -> str:
    """Draws one of the likeliest words but the old one, in its letters' case, by their probabilities."""
    texts = [tokens.decode([int(i)]).strip() for i in ids_k]
    other = [i for i, text in enumerate(texts) if text.casefold() != old.casefold()][:top_k]
    p = np.exp(z_k[other].astype(np.float64) - z_k[other].max())
    new = texts[other[rng.choice(len(other), p=p / p.sum())]]
    if old.isupper() and len(old) > 1:
        return new.upper()
    return new[:1].upper() + new[1:] if old[0].isupper() else new


# ------------------------------------------------------------------------------------------------------- there and back


def _translated(
    forward: str, back: str, items: Sequence[Item], prefixes: Sequence[str], how: Sampling, copies: int, seed: int
) -> tuple[list[Item], str]:
    if copies > 1 and not how.temperature:
        raise ValueError("copies: without `temperature` all are the same; raise it, or ask for one copy")
    first, second = open_model(forward), open_model(back)
    made, same = [], 0
    seen = {_plain(item.text) for item in items}
    texts = [item.text for item in items]
    for copy in range(copies):
        s = dataclasses.replace(how, seed=seed + copy)
        translated = _written(first, texts, prefixes[0], s)
        for item, new in zip(items, _written(second, translated, prefixes[1], s), strict=True):
            if not _plain(new) or _plain(new) in seen:
                same += 1
                continue
            seen.add(_plain(new))
            made.append(dataclasses.replace(item, masked=[(0, len(item.text))], new=[new.strip()]))
    return made, f"{same:,} came back as a text that was there, or empty, and are left out"


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _written(p: Pretrained, texts: Sequence[str], prefix: str, how: Sampling) -> list[str]:
    if p.model.family.kind != "encoder_decoder":
        raise ValueError(
            f"augment: {p.source.path} is no encoder-decoder; back_translate takes two such, as T5 or BART are"
        )
    starts, sources = p.prompts([prefix + text for text in texts])
    assert sources is not None
    out = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: -len(sources[i]))
    with mesh.on_mesh(p.mesh):
        run = p.generator()
        weights = run.prepare(p.params)
        for members in (order[at : at + ROWS] for at in range(0, len(order), ROWS)):
            answers = stream.answers(
                run, p.tokens, weights, [starts[i] for i in members], how, [sources[i] for i in members]
            )
            for i, [answer] in zip(members, answers, strict=True):
                out[i] = answer.text
    return out
