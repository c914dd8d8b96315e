"""Intervals and differences: the figures are the libraries', and the bootstrap says what statistics says."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_models import published

from jaxlm.commands import cli
from jaxlm.evaluation import bootstrap, metrics, perplexity, samples

RNG = np.random.default_rng(3)
TAGS = ["O", "B-X", "I-X", "B-Y", "I-Y"]


def whole(sample):
    return {name: float(v[0]) for name, v in sample.figures(sample.counts_NM.sum(0)[None]).items()}


def test_the_interval_of_a_mean_is_the_textbooks():
    right = (np.arange(400) < 300).astype(float)
    low, high = bootstrap.intervals(samples.means({"accuracy": right}))["accuracy"]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.004) and high == pytest.approx(0.75 + half, abs=0.004)


def test_pairing_finds_what_two_intervals_do_not():
    """The second model fails where the first does, and at 12 examples more: far less than either's own interval."""
    one = (np.arange(500) % 5 > 0).astype(float)
    other = one.copy()
    other[np.flatnonzero(one)[:12]] = 0
    a, b = samples.means({"accuracy": one}), samples.means({"accuracy": other})
    found = bootstrap.paired(a, b)["accuracy"]
    assert found["difference"] == pytest.approx(12 / 500) and found["p"] < 0.01 and found["difference_interval"][0] > 0
    assert found["interval"][0] < found["against_interval"][1]
    assert bootstrap.paired(a, b) == bootstrap.paired(a, b) != bootstrap.paired(a, b, seed=1)
    assert "+0.024" in bootstrap.table({"accuracy": found})


def test_without_a_difference_p_is_spread_evenly_and_intervals_hold():
    """1 of 20 comparisons of equal models has p < 0.05: neither more, nor hardly any."""
    few, held = 0, 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        a, b = (samples.means({"x": rng.normal(size=60)}) for _ in range(2))
        found = bootstrap.paired(a, b, resamples=500, seed=seed)["x"]
        few += found["p"] < 0.05
        held += found["interval"][0] < 0 < found["interval"][1]
    assert 5 <= few <= 30 and held >= 270
    same = samples.means({"x": RNG.normal(size=60)})
    assert bootstrap.paired(same, same)["x"]["p"] == 1


def test_few_examples_give_no_small_p():
    """Four that all agree do so once in eight times by chance; no p is given where none could be below 0.05."""
    for n, p in ((4, None), (5, None), (6, 2**-5), (8, 2**-7)):
        a, b = samples.means({"x": np.arange(n) + 1.0}), samples.means({"x": np.arange(n) * 1.0})
        found = bootstrap.paired(a, b)
        assert found["x"]["p"] == p
        assert ("too few" in bootstrap.table(found)) == (p is None)


def test_other_examples_are_refused():
    one = samples.means({"x": [1.0, 2.0]}, keys=["a", "b"])
    with pytest.raises(ValueError, match=r"2 and 3 examples; compare them on the same ones"):
        bootstrap.paired(one, samples.means({"x": [1.0, 2.0, 3.0]}))
    with pytest.raises(ValueError, match="number 2 of the examples is not the same"):
        bootstrap.paired(one, one._replace(keys=["a", "c"]))
    single = samples.means({"x": [1.0]})
    assert bootstrap.intervals(single) == {}
    alone = bootstrap.paired(single, single)["x"]
    assert alone["p"] is None and alone["interval"] is None and alone["difference"] == 0


def test_counts_add_up_to_the_libraries_figures():
    pytest.importorskip("sklearn")
    true = [list(RNG.choice(TAGS, 9)) for _ in range(40)]
    found = [[t if RNG.random() < 0.7 else str(RNG.choice(TAGS)) for t in row] for row in true]
    items = [{"where": str(i)} for i in range(40)]
    tags = samples.of_answers("tags", SimpleNamespace(labels=TAGS), items, true, found)
    assert whole(tags) == pytest.approx(metrics.tags(true, found, TAGS)[0])
    drawn = RNG.integers(0, 40, 40)  # of any resample, too
    again, _ = metrics.tags([true[i] for i in drawn], [found[i] for i in drawn], TAGS)
    sums = tags.counts_NM[drawn].sum(0)[None]
    assert {k: float(v[0]) for k, v in tags.figures(sums).items()} == pytest.approx(again)
    a, b = [row[0] for row in true], [row[0] for row in found]
    single = SimpleNamespace(kind="single", labels=[*TAGS, "never"])
    assert whole(samples.of_answers("classes", single, items, a, b)) == pytest.approx(
        metrics.classes(a, b, single.labels)[0]
    )
    multi = SimpleNamespace(kind="multi", labels=TAGS)
    a, b = ([sorted(set(row[:2])) for row in rows] for rows in (true, found))
    assert whole(samples.of_answers("classes", multi, items, a, b)) == pytest.approx(metrics.multiple(a, b, TAGS)[0])
    x = list(1000 + RNG.normal(size=40))
    y = [v + RNG.normal() for v in x]
    figures, _ = metrics.numbers(x, y)
    numbers = samples.of_answers("classes", SimpleNamespace(kind="regression"), items, x, y)
    assert whole(numbers) == pytest.approx({name: figures[name] for name in ("pearson", "mse")})


def test_counts_of_relations_and_spans_add_up_too():
    pytest.importorskip("sklearn")
    labels = ["X(e1,e2)", "X(e2,e1)", "Y", "no"]
    true, found = (list(map(str, RNG.choice(labels, 60))) for _ in range(2))
    items = [{"where": str(i)} for i in range(60)]
    sample = samples.of_answers("relations", SimpleNamespace(labels=labels, negative="no"), items, true, found)
    assert whole(sample) == pytest.approx(metrics.relations(true, found, labels, "no")[0])
    golds = [("a b", "b"), (), ("c",), ()] * 3
    told = [[("b a", 1.0)], [("", 1.0)], [("a", 2.0)], [("b", 3.0)]] * 3
    windows = [{"where": str(i)} for i in range(12) for _ in range(i % 3 + 1)]
    sample = samples.of_answers("spans", None, windows, golds, told)
    expected = {k: v for k, v in metrics.spans(golds, told)[0].items() if not k.startswith("best_")}
    assert whole(sample) == pytest.approx(expected) and len(sample.keys) == 12 and sample.unit == "questions"


def test_figures_of_classes_are_the_libraries():
    sklearn, seqeval = pytest.importorskip("sklearn.metrics"), pytest.importorskip("seqeval.metrics")
    true, found = ([list(RNG.choice(TAGS, 9)) for _ in range(40)] for _ in range(2))

    def figures(scores: str, c: SimpleNamespace, *answers) -> dict[str, list[float]]:
        sample = samples.by_class(scores, c, *answers)
        assert sample is not None
        several: dict[str, list[float]] = {}
        for name, value in whole(sample).items():
            several.setdefault(name.rpartition("/")[2], []).append(value)
        return several

    flat = [[str(tag) for row in rows for tag in row] for rows in (true, found)]
    names = ("precision", "recall", "f1", "support")
    expected = dict(zip(names, sklearn.precision_recall_fscore_support(*flat, labels=TAGS), strict=True))
    single = figures("classes", SimpleNamespace(kind="single", labels=TAGS), *flat)
    untagged = figures("tags", SimpleNamespace(labels=[*TAGS, "X"]), true, found)  # no spans: words
    for name in names:
        assert single[name] == pytest.approx(list(expected[name]))
        assert untagged[name][:-1] == pytest.approx(list(expected[name])) and untagged[name][-1] == 0
    from seqeval.scheme import IOB2

    report = seqeval.classification_report(
        *([list(map(str, row)) for row in rows] for rows in (true, found)), mode="strict", scheme=IOB2, output_dict=True
    )
    kinds = sorted({tag[2:] for tag in TAGS if tag != "O"})
    spans = figures("tags", SimpleNamespace(labels=TAGS), true, found)
    for name, key in zip(names, ("precision", "recall", "f1-score", "support"), strict=True):
        assert spans[name] == pytest.approx([report[kind][key] for kind in kinds])
    multi = [[sorted(set(map(str, row[:2]))) for row in rows] for rows in (true, found)]
    table = [[[tag in row for tag in TAGS] for row in rows] for rows in multi]
    expected = dict(zip(names, sklearn.precision_recall_fscore_support(*table, zero_division=0), strict=True))
    several = figures("classes", SimpleNamespace(kind="multi", labels=TAGS), *multi)
    assert all(several[name] == pytest.approx(list(expected[name])) for name in names)
    assert samples.by_class("classes", SimpleNamespace(kind="regression"), [1.0], [2.0]) is None
    related = figures("relations", SimpleNamespace(labels=["X(e1,e2)", "X(e2,e1)", "no"], negative="no"),
                      ["X(e1,e2)", "X(e1,e2)", "no"], ["X(e1,e2)", "X(e2,e1)", "X(e1,e2)"])  # fmt: skip
    assert related == {"precision": [pytest.approx(1 / 3)], "recall": [0.5], "f1": [0.4], "support": [2]}


def test_what_no_table_knows_is_right_or_wrong():
    sample = samples.of_answers("answers", None, [{}, {}], ["Paris", "Rome"], ["Paris", "Roma"])
    assert whole(sample) == {"exact": 0.5}


def tallied(documents: list[tuple[float, float]], rows: int) -> perplexity.Tally:
    """Documents of so many tokens with so many nats each, `rows` in a batch."""
    out = perplexity.Tally(len(documents), "documents")
    for at in range(0, len(documents), rows):
        n, v = np.array(documents[at : at + rows]).T
        each = {("tokens", "nll"): n * v, ("tokens", "loss"): n * v, ("tokens", ""): n, ("bytes", ""): 3 * n}
        unit = np.arange(at, at + len(n)) + 1
        shares = {"weights": dict(values=each, unit=unit, checksum=7 * unit)}
        out.add({column: x.sum() for column, x in each.items()}, shares)
    return out


def test_losses_are_resampled_by_document():
    for rows in (1, 2):
        found = tallied([(2, 1.0), (6, 2.0)], rows)
        sample, expected = samples.of_losses(found), found.figures()
        del expected["targets"]
        assert whole(sample) == pytest.approx(expected) and bootstrap.size(sample) == "2 documents"
        assert expected["loss"] == 1.75 and expected["bits_per_byte"] == pytest.approx(1.75 / math.log(2) / 3)
        assert bootstrap.intervals(sample)["loss"] == [1, 2]


def test_few_documents_give_no_p_and_their_number_is_known():
    """All of N documents have the same sign by chance with a probability of 2^(1 - N)."""
    for n, p in ((1, None), (5, None), (6, 2**-5), (7, 2**-6)):
        better, worse = ([(2, loss + 0.1 * i) for i in range(n)] for loss in (1.0, 2.0))
        a, b = (samples.of_losses(tallied(each, 4)) for each in (better, worse))
        loss = bootstrap.paired(a, b, 5000)["loss"]
        assert loss["p"] == p and loss["difference"] == pytest.approx(-1) and a.keys == [7 * i for i in range(1, n + 1)]
        assert bootstrap.size(a) == ("1 document" if n == 1 else f"{n} documents")
        assert loss["interval"] is None if n == 1 else loss["difference_interval"] == pytest.approx([-1, -1])
    one = a._replace(counts_NM=a.counts_NM[:1], keys=[])
    assert "too few" in bootstrap.table(bootstrap.paired(one, one))


def test_many_examples_are_drawn_in_groups():
    """A mean of 25,000 has the standard error that it has by the formula."""
    x = RNG.normal(size=25_000)
    low, high = bootstrap.intervals(samples.means({"x": x}), 2000)["x"]
    assert high - low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(len(x)), rel=0.1)
    assert low < x.mean() < high and bootstrap._grouped(np.ones((25_000, 1))).sum() == 25_000


def test_tasks_by_filter_and_with_ratios():
    def row(i, **values):
        return dict(doc_id=i, doc_hash=str(i), filter="none", metrics=list(values), **values)

    found = samples.of_tasks({"t": [row(0, acc=1.0, bits_per_byte=(-8.0, 4), f1=("a", "b")),
                                   row(1, acc=0.0, bits_per_byte=(-2.0, 6), f1=("a", "b"))]})  # fmt: skip
    assert whole(found["t"]) == pytest.approx({"acc": 0.5, "bits_per_byte": 1 / math.log(2)})
    two = samples.of_tasks({"t": [row(0, acc=1.0) | {"filter": f} for f in ("strict", "loose")]})
    assert list(two) == ["t,strict", "t,loose"]


def test_the_command_line_compares_two_models(tmp_path, capsys, monkeypatch):
    a, b = published(tmp_path / "a"), published(tmp_path / "b", seed=1)
    lines = [json.dumps({"text": f"some text and {i} of it " * 300}) for i in range(8)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    args = ["eval", str(a), "--data", "t.jsonl", "--resamples", "500"]
    assert cli.main([*args, "--against", str(b), "--json"]) == 0
    out, shown = capsys.readouterr()
    record = json.loads(out)
    held = json.loads((tmp_path / "evals/a/results.json").read_text())
    assert held["differences"] == record["differences"] and held["against"] == str(b)
    loss = record["differences"]["losses"]["loss"]
    assert loss["value"] == pytest.approx(record["loss"]) and loss["difference"] != 0
    assert "the same 8 documents, 500 paired resamples, seed 0" in shown and loss["p"] is not None
    assert cli.main([*args, "--against", str(a)]) == 0 and "1.0000" in capsys.readouterr().out
    assert cli.main(["eval", str(a), "--data", "t.jsonl", "--resamples", "5"]) == 2
    assert "--resamples: 5 is out of range; it must be at least 100" in capsys.readouterr().err
