"""Figures of the field's libraries, on examples small enough to count by hand."""

from types import SimpleNamespace

import pytest

from jaxlm.assembly import training_hooks
from jaxlm.core.figures import is_lower_better
from jaxlm.evaluation import metrics, task_scores

pytest.importorskip("seqeval")
pytest.importorskip("sklearn")


def test_an_entity_counts_only_as_a_whole():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-LOC"]]
    values, report = metrics.entities(true, found)
    assert values == pytest.approx(dict(precision=2 / 4, recall=2 / 3, f1=4 / 7))
    assert "PER" in report and "support" in report


def test_an_inside_without_a_beginning_is_no_entity():
    """The strict mode; the usual default of the library would count it."""
    values, _ = metrics.entities([["B-PER", "I-PER"]], [["I-PER", "I-PER"]])
    assert values["f1"] == 0


def test_classes_and_words():
    values, report = metrics.classes(["a", "a", "b", "b"], ["a", "b", "b", "b"], ["a", "b"])
    assert values["accuracy"] == 0.75 and values["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert "weighted avg" in report
    values, report = metrics.tags([["NN", "VB"]], [["NN", "NN"]], ["NN", "VB"])
    assert values["word_accuracy"] == 0.5 and "f1" not in values and "seqeval" not in report
    values, report = metrics.tags([["B-X", "O"]], [["B-X", "O"]], ["O", "B-X"])
    assert values["f1"] == 1 and "entities (seqeval, strict, IOB2)" in report


PREDICTIONS = {
    "classes": (["a", "b"], ["a", "a"]),
    "tags": ([["B-X", "O"]], [["B-X", "O"]]),
    "relations": (["a", "b"], ["a", "a"]),
    "choices": ([0, 1], [0, 0]),
    "spans": ([["x"], []], [[("x", 1.0)], [("", 0.0)]]),
}


@pytest.mark.parametrize("scores", task_scores.SCORES)
def test_the_names_of_all_figures_are_known_before_there_are_predictions(scores):
    true, predicted = PREDICTIONS[scores]
    c = SimpleNamespace(kind="single", labels=("B-X", "O") if scores == "tags" else ("a", "b"), negative="")
    figures, _ = task_scores.SCORES[scores](c, true, predicted)
    assert {*figures} - {"best_threshold"} == {*task_scores.FIGURES[scores](c)}


def test_the_names_of_figures_of_several_labels_and_of_numbers_are_known():
    assert {*metrics.multiple([["a"]], [["a"]], ["a"])[0]} == {*metrics.FIGURES["multi"]}
    assert {*metrics.numbers([1, 2], [1, 2])[0]} == {*metrics.FIGURES["regression"]}


def test_what_is_missing_is_named(monkeypatch):
    def gone(name):
        raise ImportError(name)

    monkeypatch.setattr(metrics.importlib, "import_module", gone)
    with pytest.raises(ValueError, match=r"need seqeval: pip install 'jaxlm\[eval\]'"):
        metrics.entities([], [])


def test_several_labels_and_numbers():
    values, _ = metrics.multiple([["a"], ["a", "b"], []], [["a"], ["b"], []], ["a", "b"])
    assert values == pytest.approx(dict(f1_micro=0.8, f1_macro=(2 / 3 + 1) / 2, exact=2 / 3))
    values, report = metrics.numbers([1.0, 2.0, 4.0], [1.0, 3.0, 9.0])
    assert values["spearman"] == pytest.approx(1) and values["mse"] == pytest.approx(26 / 3) and "pearson" in report


@pytest.mark.parametrize(
    ("true", "found", "expected"),
    [
        (["The Oslo!"], "oslo", (1, 1)),
        (["in May", "May"], "may 5", (0, 2 / 3)),
        (["Oslo"], "Rome", (0, 0)),
        ([], "", (1, 1)),
        ([], "Oslo", (0, 0)),
        (["the"], "", (1, 1)),
        (["北京大学"], "北京", (0, 2 / 3)),
        (["《北京》"], "北京。", (1, 1)),
        (["the 北京"], "北京", (0, 0.8)),
    ],
)
def test_answers_as_squad_compares_them(true, found, expected):
    assert metrics.match(true, found) == pytest.approx(expected)


def test_answers_and_none():
    true = [["a1"], ["b1"], [], []]
    found = [[("a1", 5.0), ("", 0.0)], [("", 0.0), ("b1", -2.0)], [("", 0.0), ("x", -3.0)], [("y", 1.0)]]
    values, report = metrics.spans(true, found)
    assert (values["exact"], values["hasans_f1"], values["noans_exact"]) == (0.5, 0.5, 0.5) and "noans" in report
    assert (values["best_f1"], values["best_threshold"]) == (0.75, -5), "a1 alone is told, all others have none"
    assert metrics.spans(true[:2], found[:2])[0] == dict(exact=0.5, f1=0.5)


def test_relations_as_semeval_and_tacred_count_them():
    labels = ["X(e1,e2)", "X(e2,e1)", "Y(e1,e2)", "Other"]
    true = ["X(e1,e2)", "X(e1,e2)", "X(e2,e1)", "Y(e1,e2)", "Other", "Other"]
    found = ["X(e1,e2)", "X(e2,e1)", "Other", "Y(e1,e2)", "Y(e1,e2)", "Other"]
    values, report = metrics.relations(true, found, labels, "Other")
    # X: 1 right of 2 found and 3 true; Y: 1 of 2 and 1.
    assert values == pytest.approx(dict(f1_macro=(2 / 5 + 2 / 3) / 2, f1_micro=4 / 8, precision=0.5, recall=0.5,
                                        accuracy=0.5))  # fmt: skip
    assert "relations, without 'Other'" in report and "support" in report
    values, _ = metrics.relations(["a", "b"], ["a", "a"], ["a", "b"], "")
    assert values["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)


def test_choices_and_a_liking_for_one():
    values, report = metrics.choices([0, 1, 1, 2], [1, 1, 1, 1])
    assert values == dict(accuracy=0.5) and "B          0.5000   1.0000" in report


def test_every_figure_says_whether_less_of_it_is_better():
    figures = metrics.classes(["a", "b"], ["a", "a"], ["a", "b"])[0]
    figures |= metrics.tags([["B-X", "O"]], [["B-X", "O"]], ["O", "B-X"])[0]
    figures |= metrics.multiple([["a"], []], [["a"], ["b"]], ["a", "b"])[0]
    figures |= metrics.numbers([1.0, 2.0, 3.0], [1.0, 2.5, 2.0])[0]
    figures |= metrics.relations(["a", "b"], ["a", "a"], ["a", "b"], "")[0] | metrics.choices([0, 1], [0, 0])[0]
    figures |= metrics.spans([["a"], []], [[("a", 1.0)], [("", 0.0)]])[0]
    lower = {name for name in figures if is_lower_better(name)}
    unknown = {name for name in figures if is_lower_better(name) is None}
    assert (lower, unknown) == ({"mse"}, {"best_threshold"})
    assert is_lower_better("tokens/perplexity") and is_lower_better("pairs/accuracy") is False


def test_the_checkpoint_with_the_lowest_error_is_the_best():
    def of(metric):
        run = SimpleNamespace(train=SimpleNamespace(metric=metric))
        return training_hooks.score(run, {"mse": 2.0, "accuracy": 0.5, "own": 3.0})

    assert (of("mse"), of("accuracy"), of("min:own"), of("max:own")) == (2.0, -0.5, 3.0, -3.0)
    for name, message in {"own": r"^train\.metric: say whether .* min:own or max:own$", "mes": "did you mean 'mse'",
                          "high:own": "unknown 'high:own'"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            of(name)
