"""Questions on texts whose answers stand in them: SQuAD 1.1 and 2.0, and what is written as they are (XQuAD, CMRC).

Read: their nested JSON; or one question a record of JSON lines, a JSON list or TFDS, with `answers` as these have them
(`{"text": […], "answer_start": […]}`) or as a list of `{"text": …, "answer_start": …}`.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxlm.data.labelled import Question, Split, split, tables


class Names(NamedTuple):
    """Columns of flat records."""

    question: str = "question"
    context: str = "context"
    answers: str = "answers"


def read(source: str, names: Names | None = None) -> Split:
    """Answers that don't stand where they are said to are left out, and questions that keep none of theirs."""
    found: list[Question] = []
    problems: list[str] = []
    for where, id, question, context, given in _records(source, names or Names()):
        if not question or not context.strip():
            raise ValueError(f"{where}: an empty {'context' if question else 'question'}; remove it")
        held = []
        for start, text in given:
            there = context[max(0, start) : start + len(text)]
            if text.strip() and there == text:
                held.append((start + len(text) - len(text.lstrip()), text.strip()))
            else:
                problems.append(f"{where}: the answer {text!r} is not at character {start}, where {there!r} stands")
        if held or not given:
            found.append(Question(where, id, question, context, tuple(held)))
    return split(source, found, problems)


Record = tuple[str, str, str, str, list[tuple[int, str]]]


def _records(source: str, names: Names) -> Iterator[Record]:
    """(where, id, question, context, answers)."""
    if (nested := _nested(source)) is not None:
        yield from nested
        return
    for row in tables.read(source):
        # Not stripped, unlike other cells: characters are counted from its beginning.
        context, question = row.cells.get(names.context), row.text(names.question, "objective.question")
        row.text(names.context, "objective.context")
        id = str(row.cells.get("id", row.where))
        yield row.where, id, question, str(context), _answers(row.where, row.cells, names.answers)


def _nested(source: str) -> Iterator[Record] | None:
    """None: the source is no nested file."""
    if not source.endswith(".json"):
        return None
    path = tables.existing(source)
    try:
        value = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        return None
    if not isinstance(value.get("data"), list):
        raise ValueError(f"{path}: an object without a list 'data', which SQuAD's files have; correct it")
    return _paragraphs(str(path), value["data"])


def _paragraphs(path: str, articles: list) -> Iterator[Record]:
    where, seen = path, set()
    try:
        for i, article in enumerate(articles):
            where = f"{path}: article {i}"
            for paragraph in article["paragraphs"]:
                for q in paragraph["qas"]:
                    where = f"{path}: question {q['id']}"
                    if where in seen:
                        raise ValueError(f"{where} stands there twice; remove one, or give it an id of its own")
                    seen.add(where)
                    answers = [] if q.get("is_impossible") else _answers(where, q, "answers")
                    yield where, str(q["id"]), q["question"].strip(), paragraph["context"], answers
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not as SQuAD's files are ({type(error).__name__}: {error}); correct it") from error


def _answers(where: str, cells: dict[str, Any], name: str) -> list[tuple[int, str]]:
    """(first character, text) of each."""
    value = cells.get(name)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = [
            dict(text=t, answer_start=s) for t, s in zip(value["text"], value.get("answer_start", ()), strict=False)
        ]
    if isinstance(value, list) and all(isinstance(a, dict) and {"text", "answer_start"} <= a.keys() for a in value):
        return [(int(a["answer_start"]), str(a["text"])) for a in value]
    there = ", ".join(cells) or "none"
    raise ValueError(
        f"{where}: no answers {name!r} with text and answer_start; columns there: {there}. Set objective.answers"
    )
