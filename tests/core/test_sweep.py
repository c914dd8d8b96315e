"""A space is read and checked against the fields of a run before anything runs."""

import dataclasses

import pytest

from jaxlm.core import config, sweep
from jaxlm.core.sweep import Between, Choice, Settings
from jaxlm.models import llama
from jaxlm.objectives import causal

RUN = config.Run("x", llama.Config(), causal.Config(), train=config.Train(steps=100, eval_every=10))


def test_expressions_have_the_types_of_their_fields():
    space = sweep.read(
        ["optim.lr=log(1e-4, 1e-2)", "train.batch_size=16|32", "train.seq_len=uniform(64,256,64)",
         "optim.freeze=a,b|", "optim.top_layers=1|none", "execution.scan=true|none", "optim.schedule=linear|cosine",
         "train.use=best|last"],
        RUN,
    )  # fmt: skip
    assert space == {
        "optim.lr": Between(1e-4, 1e-2, log=True), "train.batch_size": Choice((16, 32)),
        "train.seq_len": Between(64, 256, step=64), "optim.freeze": Choice((("a", "b"), ())),
        "optim.top_layers": Choice((1, None)), "execution.scan": Choice((True, None)),
        "optim.schedule": Choice(("linear", "cosine")), "train.use": Choice(("best", "last")),
    }  # fmt: skip
    sweep.check(space, RUN)


@pytest.mark.parametrize("expressions, message", [
    (["optim.lrr=1|2"], r"space: unknown config key optim\.lrr; did you mean 'optim\.lr'\?"),
    (["optim=1|2"], r"space: optim is a part with fields of its own: optim\.name"),
    (["optim.lr"], r"space: 'optim\.lr' says no values; write "),
    (["optim.lr=1|2", "optim.lr=3|4"], "space: optim.lr stands twice"),
    (["optim.lr=fast|slow"], "space: optim.lr: 'fast' is not a valid float"),
    (["optim.lr=loguniform(1,2)"], r"neither log\(low,high\) nor uniform"),
    (["optim.lr=log(1e-4,1e-2,2)"], r"is not log\(low,high\)"),
    (["optim.lr=log(0,1)"], "begins above 0"),
    (["optim.lr=log(1e-2,1e-4)"], "0.01 is not below 0.0001"),
    (["optim.lr=uniform(a,b)"], "something else than numbers"),
    (["train.steps=uniform(1.5,3)"], "takes whole numbers"),
    (["train.seq_len=uniform(64,128,512)"], "a step of 512 doesn't fit"),
    (["data.train=uniform(0,1)"], "is no number, so it has no range"),
    (["optim.lr=1e-3"], "one value is no choice"),
    (["optim.lr=1e-3|0.001"], "0.001 stands twice"),
    (["seed=1|2"], "`seeds` repeat each trial"),
    (["train.metric=f1|loss"], "what all trials are compared by"),
    ([], "give the fields that vary"),
])  # fmt: skip
def test_a_slip_in_a_space_is_one_line(expressions, message):
    with pytest.raises(ValueError, match=message):
        sweep.check(sweep.read(expressions, RUN), RUN)


def test_points_are_all_combinations_of_choices_and_steps():
    space = sweep.read(["train.batch_size=16|32", "train.seq_len=uniform(64,256,64)"], RUN)
    points = sweep.points(space, RUN)
    assert len(points) == 8 and points[0] == {"train.batch_size": 16, "train.seq_len": 64}
    assert points[-1] == {"train.batch_size": 32, "train.seq_len": 256} and type(points[0]["train.seq_len"]) is int
    assert sweep.points(sweep.read(["optim.lr=uniform(0,1)"], RUN), RUN) is None
    steps = sweep.points(sweep.read(["optim.beta1=uniform(0.1,0.4,0.1)"], RUN), RUN)
    assert [round(p["optim.beta1"], 6) for p in steps] == [0.1, 0.2, 0.3, 0.4]


def test_labels_of_choices_lead_back_to_their_values():
    space = sweep.read(["optim.freeze=a,b|c", "optim.top_layers=1|none"], RUN)
    assert sweep.labels(space["optim.freeze"]) == ["a,b", "c"]
    point = {"optim.freeze": "a,b", "optim.top_layers": None}
    assert sweep.values(space, point) == {"optim.freeze": ("a", "b"), "optim.top_layers": None}


def test_settings_that_cannot_search_a_space_are_refused():
    lr, choice = sweep.read(["optim.lr=log(1e-4,1e-2)"], RUN), sweep.read(["train.batch_size=16|32"], RUN)
    late = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, eval_every=0))
    for settings, space, run, message in (
        (Settings(sampler="grid"), lr, RUN, "sampler: grid tries every point"),
        (Settings(sampler="cma-es"), lr, RUN, "two ranges or more"),
        (Settings(sampler="cma-es"), lr | choice, RUN, "no choices"),
        (Settings(), lr, late, r"pruner: median looks at validations before the end, and train\.eval_every 0"),
        (Settings(seeds=(1, 1)), lr, RUN, "seeds: give each once"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep.check_settings(settings, space, run)
    assert sweep.check_settings(Settings(), lr, RUN) == sweep.TRIALS
    assert sweep.check_settings(Settings(sampler="grid"), choice, RUN) == 2
    assert sweep.check_settings(Settings(sampler="grid", trials=9), choice, RUN) == 2
    assert sweep.check_settings(Settings(pruner="none", trials=9), lr, late) == 9
