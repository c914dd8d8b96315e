"""Trees by path: names, selection, partition and merge."""

import pytest

from jaxlm.core import tree

TREE = {"b": {"y": 1, "x": {"z": 2}}, "a": 3, "hole": None}


def test_flatten_names_leaves_in_order_and_skips_holes():
    assert list(tree.flatten(TREE).items()) == [("a", 3), ("b/x/z", 2), ("b/y", 1)]


def test_flatten_stops_at_leaves():
    assert tree.flatten(TREE, lambda x: isinstance(x, dict) and "z" in x)["b/x"] == {"z": 2}


def test_map_named_keeps_holes():
    assert tree.map_named(lambda path, x: f"{path}={x}", TREE) == {
        "b": {"y": "b/y=1", "x": {"z": "b/x/z=2"}},
        "a": "a=3",
        "hole": None,
    }


@pytest.mark.parametrize("keep", ["b/", "a", "nothing", ""])
def test_merge_is_the_inverse_of_partition(keep):
    first, second = tree.partition(TREE, lambda path: keep in path)
    assert set(tree.flatten(first)) == {p for p in tree.flatten(TREE) if keep in p}
    assert not set(tree.flatten(first)) & set(tree.flatten(second))
    assert tree.merge(first, second) == tree.merge(second, first) == TREE


def test_matcher_searches_anywhere_in_a_path():
    match = tree.matcher(["^b/", "^a$"], tree.flatten(TREE), "optim.freeze")
    assert [match(p) for p in ("a", "b/x/z", "ab", "cb/")] == [True, True, False, False]
    assert not tree.matcher([], ["a"], "f")("a")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("c", r"optim\.freeze: pattern 'c' matches no parameter; there are: a, b/x/z, b/y"),
        ("(", r"optim\.freeze: '\(' is not a regular expression"),
    ],
)
def test_matcher_refuses_patterns_that_fit_nothing(pattern, message):
    with pytest.raises(ValueError, match=message):
        tree.matcher(["a", pattern], tree.flatten(TREE), "optim.freeze")


def test_the_first_difference_is_named_with_both_values():
    assert tree.difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a[1].b is 2 there and 3 here"
    assert tree.difference({"a": 1}, {"a": 1}) is None
    assert tree.difference({"a": [1]}, {"a": [1, 2]}) == "a is [1] there and [1, 2] here"
