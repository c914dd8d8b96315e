"""A sweep makes the same trials whatever happens to it, and says what each came to.

Trials are trained by `support/pretended_training.py`, which writes their logs by a formula; the slow test trains.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from support import pretended_training

import jaxlm
from jaxlm.assembly import sweep as sweeps
from jaxlm.assembly import sweep_process, sweep_study
from jaxlm.assembly.sweep_study import Search, Trial
from jaxlm.core import config
from jaxlm.core import sweep as spaces
from jaxlm.core.sweep import Between, Choice, Settings
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.training import sweep_report

LAUNCHER = f"{sys.executable} -S {Path(pretended_training.__file__)}"
LR = {"optim.lr": Between(1e-4, 1e-1, log=True)}
SPACE = LR | {"train.batch_size": Choice((8, 16)), "optim.freeze": Choice((("a", "b"), ()))}


def make_run(folder: Path, name: str = "s", **train) -> config.Run:
    model = llama.Config(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16)
    train = {"steps": 12, "batch_size": 8, "seq_len": 32, "eval_every": 2, "prompts": ()} | train
    return config.Run(name, model, causal.Config(), config.Data(train=("x.txt",), tokenizer="bytes"),
                      train=config.Train(**train), out=str(folder))  # fmt: skip


def search(run: config.Run, space=SPACE, **settings) -> dict:
    said: list[str] = []
    settings = {"launcher": LAUNCHER, "trials": 6, "startup": 2} | settings
    status = sweeps.search(run, space, Settings(**settings), said.append)
    results = json.loads((run.folder / "results.json").read_text())
    return results | {"status": status, "said": said}


def comparable(results: dict) -> list[dict]:
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in results["trials"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    return search(make_run(tmp_path_factory.mktemp("undisturbed")), parallel=2)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


def test_killed_at_any_write_it_goes_on_to_the_same_trials(undisturbed, tmp_path, monkeypatch):
    run, left = make_run(tmp_path), [0]

    def acquire(self) -> bool:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return True

    monkeypatch.setattr(sweep_study._OneWriter, "acquire", acquire)
    for kill in range(60):
        left[0] = 4 + 5 * (kill % 3)
        try:
            results = search(run, parallel=2)
            break
        except Killed:
            with (run.folder / "journal.log").open("ab") as file:
                file.write(b'{"op_code": 7, "half a li')
    assert kill >= 4 and results["status"] == 0
    assert comparable(results) == comparable(undisturbed)


def test_more_trials_go_on_as_if_all_had_been_asked_for_at_once(undisturbed, tmp_path):
    run = make_run(tmp_path)
    first = search(run, trials=3, parallel=2)
    assert comparable(first) == comparable(undisturbed)[:3]
    assert comparable(search(run, parallel=2)) == comparable(undisturbed)


def test_trials_are_pruned_by_earlier_ones_and_the_best_is_a_file(tmp_path):
    run = make_run(tmp_path)
    results = search(run, trials=12)
    trials = results["trials"]
    assert results["counts"]["pruned"] >= 2 and results["counts"]["failed"] == 0
    best = trials[results["best"]]
    assert best["value"] == min(t["value"] for t in trials if t["state"] == "complete")
    for t in trials:
        if t["state"] == "pruned":
            earlier = [u for u in trials[: t["number"]] if u["state"] == "complete"]
            at = sorted(dict(u["steps"])[t["steps"][-1][0]] for u in earlier)
            assert t["value"] > at[(len(at) - 1) // 2], "it was better than the median of those before it"
    again = jaxlm.load(run.folder / "best.json")
    assert again.optim.lr == best["params"]["optim.lr"] and again.name == "s-best" and again.folder != run.folder
    assert again.optim.freeze == tuple(filter(None, best["params"]["optim.freeze"].split(",")))
    assert [p.parts[-3] for p in run.folder.glob("trials/*/*/checkpoints")] == [f"{results['best']:04d}"]
    assert search(run, trials=12)["said"][0].endswith("12 of 12 trials have ended")


def test_a_failed_trial_has_a_reason_and_ends_nothing(tmp_path):
    space = {"optim.lr": Choice((0.01, 10.0)), "train.batch_size": Choice((8, 13, 14, 4))}
    results = search(make_run(tmp_path), space, sampler="grid", pruner="none", trials=None)
    said = {(t["params"]["optim.lr"], t["params"]["train.batch_size"]): t["reason"] for t in results["trials"]}
    assert results["status"] == 0 and results["counts"] == {"complete": 2, "pruned": 0, "failed": 6, "running": 0}
    assert said[0.01, 8] is None and said[10.0, 8] == "step 2: loss nan"
    assert said[0.01, 13] == "train.batch_size: 13 rows don't divide"
    assert said[0.01, 14].startswith("its process was killed by signal 9")


def test_a_trial_is_the_mean_over_seeds_and_the_first_decides_whether_it_goes_on(tmp_path):
    results = search(make_run(tmp_path), LR, seeds=(0, 50), trials=4, startup=1)
    trial = next(t for t in results["trials"] if t["state"] == "complete")
    assert trial["values"][1] - trial["values"][0] == pytest.approx(0.05)
    assert trial["value"] == pytest.approx(sum(trial["values"]) / 2)
    assert trial["interval"][0] < trial["value"] < trial["interval"][1]
    pruned = next(t for t in results["trials"] if t["state"] == "pruned")
    assert not (tmp_path / "s" / "trials" / f"{pruned['number']:04d}" / "seed-50").exists()


def test_methods_of_fine_tuning_and_their_fields_vary_together(tmp_path):
    space = ["adapter=lora|dora", "adapter.rank=uniform(2,8)"]
    results = search(make_run(tmp_path), space, trials=4, pruner="none")
    assert results["counts"]["complete"] == 4
    runs = [json.loads(file.read_text())["adapter"] for file in sorted((tmp_path / "s/trials").glob("*/*/config.json"))]
    assert [{"adapter": a["family"], "adapter.rank": a["rank"]} for a in runs] == [
        trial["params"] for trial in results["trials"]
    ]
    assert {a["family"] for a in runs} == {"lora", "dora"}


def test_a_stop_lets_trials_save_and_the_same_call_goes_on(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.setenv("JAXLM_TEST_SECONDS", "0.15")
    asked: list[int] = []
    monkeypatch.setattr(sweeps.time, "sleep", lambda s, real=time.sleep: (real(s), stop_once_under_way(run, asked)))
    first = search(run, LR, trials=1)
    assert first["status"] == 1 and first["said"][-1].startswith("stopped after 0 of 1 trials")
    assert "interrupted after step" in (run.folder / "trials/0000/seed-0.log").read_text()
    monkeypatch.undo()
    assert search(run, LR, trials=1)["status"] == 0
    assert len((run.folder / "trials/0000/seed-0/starts").read_text().split()) == 2


def stop_once_under_way(run: config.Run, asked: list[int]) -> None:
    if not asked and (run.folder / "trials/0000/seed-0/metrics.jsonl").exists():
        asked.append(1)
        os.kill(os.getpid(), signal.SIGTERM)


def test_trials_at_once_have_devices_of_their_own(tmp_path):
    settings = Settings(parallel=2)
    shares = sweep_process.environments(settings, {}, gpus=4)
    assert shares == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert sweep_process.environments(settings, {}, gpus=0) == [{}, {}]
    with pytest.raises(ValueError, match="parallel: 2 trials at once have no GPU each"):
        sweep_process.environments(settings, {"CUDA_VISIBLE_DEVICES": "3"}, gpus=4)
    with pytest.raises(ValueError, match="devices: names 1 places, and 2 trials"):
        sweep_process.environments(Settings(parallel=2, devices=("0",)), {}, gpus=4)
    search(make_run(tmp_path), trials=2, parallel=2, devices=("5", "CUDA_VISIBLE_DEVICES=6,7"))
    starts = [(tmp_path / f"s/trials/000{i}/seed-0/starts").read_text().strip() for i in (0, 1)]
    assert sorted(starts) == ["5", "6,7"]


def test_a_directory_of_another_sweep_or_one_at_work_is_left_alone(tmp_path):
    run = make_run(tmp_path)
    search(run, LR, trials=1)
    with pytest.raises(ValueError, match=r"holds another sweep: space\.optim\.lr\.high is 0\.1 there and 0\.2 here"):
        search(run, {"optim.lr": Between(1e-4, 0.2, log=True)})
    with pytest.raises(ValueError, match=r"settings\.sampler is 'tpe' there and 'random' here"):
        search(run, LR, sampler="random")
    lock = sweep_process.held(run.folder / "lock")
    with pytest.raises(ValueError, match="another process is at work on this sweep"):
        search(run, LR, trials=2)
    lock.close()
    assert search(run, LR, trials=2)["counts"]["running"] == 0


# Proposals and judgements, without processes.


def of(space=SPACE, folder: Path = Path("x"), **settings) -> Search:
    run = make_run(folder)
    return Search(Settings(**settings), space, run, run, lower=True)


def history(found: Search, count: int, parallel: int = 1) -> list[Trial]:
    """Returns trials that the sampler proposes, each with a value by its rate."""
    trials: list[Trial] = []
    for number in range(count):
        known = max(0, number - parallel + 1)
        params = sweep_study.propose(found, trials, known)
        value = abs(params.get("optim.lr", 0.0) - 0.01)
        trials.append(Trial(number, params, known, "complete", value, {2: value + 0.1, 4: value}))
    return trials


SAMPLERS = ["tpe", "qmc", "random", "grid", "brute-force", "cma-es"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_proposal_depends_on_what_it_may_know_alone(sampler):
    if sampler == "cma-es":
        pytest.importorskip("cmaes")
    numbers = {"optim.beta1": Between(0.1, 0.9), **LR}
    whole = {"train.batch_size": Choice((4, 8, 16)), "train.seq_len": Between(32, 96, step=32)}
    found = of({"cma-es": numbers, "grid": whole, "brute-force": whole}.get(sampler, SPACE), sampler=sampler)
    trials = history(found, 9 if sampler in spaces.WHOLE else 14, parallel=3)
    points = [json.dumps(t.params, sort_keys=True) for t in trials]
    assert len(set(points)) == len(points), "a point was proposed twice"
    last = trials[-1]
    for later in (
        trials[:-1],
        [t if t.number < last.known else Trial(t.number, t.params, t.known) for t in trials[:-1]],
    ):
        assert sweep_study.propose(found, later, last.known) == last.params
    other = of(found.space, sampler=sampler, sampler_seed=1)
    assert [t.params for t in history(other, 3)] != [t.params for t in trials[:3]]


def test_tpe_learns_from_trials_and_avoids_those_that_failed_by_their_settings():
    found = of(LR)
    good = history(found, 30)
    assert sum(abs(t.value) < 0.01 for t in good[15:]) > 10, "it doesn't search where values are good"
    fault = {"reason": "x", "by_settings": True}
    worst = [
        Trial(t.number, t.params, t.known, "failed", about=fault) if t.params["optim.lr"] > 1e-3
        else Trial(t.number, t.params, t.known, "complete", 1.0)
        for t in good
    ]  # fmt: skip
    proposed = [sweep_study.propose(found, worst[:20] + worst[20 : 20 + k], 20 + k)["optim.lr"] for k in range(8)]
    assert sum(lr < 1e-3 for lr in proposed) >= 6


@pytest.mark.parametrize("pruner", ["median", "percentile", "halving", "hyperband"])
def test_bad_trials_are_stopped_and_the_best_goes_on(pruner):
    found = of(pruner=pruner, startup=3)
    trials = history(found, 14)
    for i, t in enumerate(trials):
        rungs = sweep_study.judge(found, trials[:i], t, t.steps)[1]
        assert bool(rungs) == (pruner == "halving") or pruner == "hyperband"  # some of whose brackets begin later
        trials[i] = Trial(t.number, t.params, t.known, t.state, t.value, t.steps, rungs)

    def cuts(steps: dict[int, float], known: int) -> set[int | None]:
        new = [Trial(n, trials[0].params, min(n, known)) for n in range(9, 14)]
        return {sweep_study.judge(found, trials[: t.number], t, steps)[0] for t in new}

    some = {2, None} if pruner == "hyperband" else {2}  # one of its brackets lets all go on
    assert cuts({2: 100.0, 4: 100.0}, 14) == some
    assert cuts({2: -1.0, 4: -1.0}, 14) == {None}
    assert pruner in ("halving", "hyperband") or cuts({2: 100.0}, 0) == {None}, "nothing is known of others"


def test_the_journal_is_read_by_optuna_itself(undisturbed, tmp_path):
    run = make_run(tmp_path)
    results = search(run, LR, trials=3)
    backend = optuna.storages.journal.JournalFileBackend(str(run.folder / "journal.log"))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert study.best_value == results["trials"][results["best"]]["value"] and len(study.trials) == 3


def test_names_and_errors_are_text_on_the_page(undisturbed):
    evil = "<img src=x onerror=alert(1)>"
    results = json.loads(json.dumps(undisturbed))
    results["name"] = results["metric"] = evil
    results["space"][evil] = {"choices": [evil, "b"]}
    results["own"][evil] = evil
    for t in results["trials"]:
        t["params"][evil] = evil
    results["trials"][-1] |= {"state": "failed", "reason": evil, "value": None, "steps": []}
    page = sweep_report.page(results)
    assert "<img" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;") > 10
    assert not re.search(r"(src|href)=[\"']?http|<script|url\(", page)
    assert page.count("<svg") == page.count("</svg>") >= 6
    assert evil in sweep_report.table(results)


def test_a_page_of_an_unfinished_sweep_says_so(tmp_path):
    found = of(LR, tmp_path)
    from jaxlm.assembly import sweep_results

    results = sweep_results.collect(found, [Trial(0, {"optim.lr": 0.1}, 0)], 5)
    assert "No trial is complete yet" in sweep_report.page(results) and "1 unfinished" in sweep_report.table(results)


def test_a_process_stops_when_who_started_it_is_gone():
    code = "from jaxlm.runtime import processes; processes.stop_with_input(); print(1, flush=True); import time; " \
           "time.sleep(60)"  # fmt: skip
    env = os.environ | {"JAXLM_STOPS_WITH_INPUT": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as p:
        assert p.stdout.readline() == b"1\n"
        p.stdin.close()
        assert p.wait(20) == -signal.SIGTERM


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_checkpoint_of_the_trial_that_it_trained(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("".join(f"line {i} of a text that is learned\n\n" for i in range(400)))
    (tmp_path / "c.py").write_text(CONFIG)
    words = [sys.executable, "-m", "jaxlm", "sweep", "c.py", "--space", "optim.lr=log(1e-3,1e-1)", "--trials", "2",
             "--json"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(Path(jaxlm.__file__).parents[1])}
    monkeypatch.chdir(tmp_path)
    trial = Path("runs/r/trials/0000/seed-0")
    with subprocess.Popen(words, env=env) as process:
        while not list(trial.glob("checkpoints/checkpoint-*")):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert results["counts"]["complete"] == 2
    assert "continuing" in (trial.parent / "seed-0.log").read_text()
    steps = [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()
             if json.loads(line)["kind"] == "valid"]  # fmt: skip
    assert steps == list(range(0, 201, 20))
    assert jaxlm.evaluate(f"runs/r/trials/{results['best']:04d}/seed-0")["loss"] < 3
    assert jaxlm.load("runs/r/best.json").optim.lr == results["trials"][results["best"]]["params"]["optim.lr"]


CONFIG = """
from jaxlm.core.config import Data, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal


def config():
    return Run("r", llama.Config(vocab=264, layers=1, width=16, heads=2, kv_heads=1, head_width=8, ffn=16),
               causal.Config(), Data(train=("x.txt",), holdout=0.2, tokenizer="bytes", cache="cache",
               tokenize_workers=0), Optim(warmup=2),
               train=Train(steps=200, batch_size=8, seq_len=32, eval_every=20, save_every=20, prompts=()))
"""
