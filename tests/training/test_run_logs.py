"""What the logs of a run say of its rows: which chose its checkpoint, and which were never seen."""

import json
from pathlib import Path
from typing import Any

from jaxlm.training import run_logs
from jaxlm.training.log import RunLog

TEST = dict(figures={"accuracy": 0.5}, intervals={"accuracy": [0.25, 0.75]}, over="8 examples", used=2)


def logs(folder: Path, steps: tuple[int, ...], tests: int = 0, reason: str = "finished", **train: Any) -> run_logs.Logs:
    with RunLog(folder, tensorboard=False) as out:
        for step in (0, *steps):
            out.valid(step, {"accuracy": 0.75 if step == 2 else 0.5, "loss": 1.0}, {})
        for _ in range(tests):
            out.event(steps[-1], "test", **TEST)
        out.event(steps[-1], "end", reason=reason, used=2 if train.get("use") == "best" else steps[-1])
    (folder / "config.json").write_text(json.dumps({"train": {"metric": "accuracy", "use": "last"} | train}))
    return run_logs.read(folder)


def told(found: run_logs.Logs) -> list[str]:
    results = run_logs.results(found)
    return [*map(run_logs.said, results), run_logs.advice(results)]


def test_rows_that_chose_the_checkpoint_are_told_from_those_that_did_not(tmp_path):
    flatters = "scores on rows that chose the checkpoint flatter it; name rows that were never seen as data.test"
    best = "chose the checkpoint: step 2 by the best accuracy of 2 validations"
    for number, (arguments, expected) in enumerate((
        (dict(steps=(2, 4), use="best"), [f"valid ({best}): accuracy 0.75, loss 1", flatters]),
        (dict(steps=(2,), use="best"), ["valid (held out, and chose nothing): accuracy 0.75, loss 1", ""]),
        (dict(steps=(2, 4)), ["valid (held out, and chose nothing): accuracy 0.5, loss 1", ""]),
        (
            dict(steps=(2, 4), reason="stopped early"),
            ["valid (chose the checkpoint: training stopped at step 4, for they got no better): accuracy 0.5, loss 1",
             flatters],
        ),
        (
            dict(steps=(2, 4), use="best", tests=1),
            [f"valid ({best}): accuracy 0.75", "test (never seen, 8 examples): accuracy 0.5 [0.25, 0.75]", ""],
        ),
    )):  # fmt: skip
        assert told(logs(tmp_path / str(number), **arguments)) == expected  # type: ignore[arg-type]


def test_rows_that_were_scored_twice_are_said_to_be(tmp_path):
    found = logs(tmp_path, (2, 4), tests=2)
    assert run_logs.role(found, "test") == "never seen; scored 2 times, as the run was given more steps after its end"
