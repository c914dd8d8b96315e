"""Reads questions whose answers are spans of a text: SQuAD 1.1 and 2.0, and files in their format (XQuAD, CMRC).

The format is their nested JSON, or one question a record of JSON lines, a JSON list or TFDS, with `answers` as these
have them (`{"text": […], "answer_start": […]}`) or as a list of `{"text": …, "answer_start": …}`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxlm.data.labelled import Question, Split, make_split, tables
from jaxlm.data.text_input import kind_of, read_json


class Names(NamedTuple):
    """Names of the fields of flat records."""

    question: str = "question"
    context: str = "context"
    answers: str = "answers"


def read(source: str, names: Names | None = None) -> Split:
    """Reads the questions of a source.

    Answers that don't stand at the character they name are left out, and so are questions that lose all their answers.
    """
    questions: list[Question] = []
    problems: list[str] = []
    for where, id, question, context, answers in _records(source, names or Names()):
        if not question or not context.strip():
            raise ValueError(f"{where}: an empty {'context' if question else 'question'}; remove it")
        matching = []
        for start, text in answers:
            actual = context[max(0, start) : start + len(text)]
            if text.strip() and actual == text:
                matching.append((start + len(text) - len(text.lstrip()), text.strip()))
            else:
                problems.append(f"{where}: the answer {text!r} is not at character {start}, where {actual!r} stands")
        if matching or not answers:
            questions.append(Question(where, id, question, context, tuple(matching)))
    return make_split(source, questions, problems)


def rows(source: str, names: Names | None = None) -> Iterator[tables.Row]:
    """Yields the questions of a source without their answers, as rows of a table by the names of its fields."""
    names = names or Names()
    if (nested := _nested(source)) is None:
        yield from tables.read(source)
        return
    for where, id, question, context, _ in nested:
        yield tables.Row(where, {"id": id, names.question: question, names.context: context})


Record = tuple[str, str, str, str, list[tuple[int, str]]]
"""A record is (where, id, question, context, answers)."""


def _records(source: str, names: Names) -> Iterator[Record]:
    if (nested := _nested(source)) is not None:
        yield from nested
        return
    for row in tables.read(source):
        # The context isn't stripped, unlike other cells: answers count characters from its beginning.
        context, question = row.cells.get(names.context), row.text(names.question, "objective.question")
        row.text(names.context, "objective.context")
        id = str(row.cells.get("id", row.where))
        yield row.where, id, question, str(context), _answers(row.where, row.cells, names.answers)


def _nested(source: str) -> Iterator[Record] | None:
    """Returns the records of a nested file, or None if the source isn't one."""
    if not source.endswith(".json"):
        return None
    path = tables.existing_file(source)
    value = read_json(path)
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
                    cells = tables.Row(where, {"question": q["question"], "context": paragraph["context"]})
                    question = cells.text("question", "the file")
                    cells.text("context", "the file")
                    yield where, str(q["id"]), question, paragraph["context"], answers
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not as SQuAD's files are ({type(error).__name__}: {error}); correct it") from error


def _answers(where: str, cells: dict[str, Any], name: str) -> list[tuple[int, str]]:
    """Returns (first character, text) of each answer of a record."""
    value = cells.get(name)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        starts = value.get("answer_start")
        if not isinstance(starts, list) or len(starts) != len(value["text"]):
            raise ValueError(f"{where}: {name} has {len(value['text'])} texts, and as many answer_start are due")
        value = [dict(text=t, answer_start=s) for t, s in zip(value["text"], starts, strict=True)]
    if isinstance(value, list) and all(isinstance(a, dict) and {"text", "answer_start"} <= a.keys() for a in value):
        for a in value:
            if type(a["answer_start"]) is not int or not isinstance(a["text"], str):
                raise ValueError(f"{where}: an answer is {kind_of(a['text'])} at {kind_of(a['answer_start'])}, where "
                                 "a text and the number of its first character are due; correct it")  # fmt: skip
        return [(a["answer_start"], a["text"]) for a in value]
    fields = ", ".join(cells) or "none"
    raise ValueError(
        f"{where}: no answers {name!r} with text and answer_start; columns there: {fields}. Set objective.answers"
    )
