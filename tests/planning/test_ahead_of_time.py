"""The compiled train step beside theory, and the command line of plan and tune."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.assembly import remember
from jaxlm.commands import cli, plan_report
from jaxlm.core import config, config_io
from jaxlm.core.continual import Continual, Der, Replay
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.planning import ahead_of_time, mesh_search, plan, roofline, targets
from jaxlm.runtime import mesh
from jaxlm.training.continual import penalty

TINY = llama.Config(vocab=512, layers=3, width=128, heads=4, kv_heads=4, head_width=32, ffn=256, positions=128)
CONFIG = """
from jaxlm import Data, Execution, Mesh, Optim, Run, Train
from jaxlm.models import llama
from jaxlm.objectives import causal

def config():
    return Run(
        name="tiny", model=llama.Config(vocab=256, layers=1, width=32, heads=4, kv_heads=4, head_width=8, ffn=64),
        objective=causal.Config(), train=Train(batch_size=8, seq_len=16), optim=Optim(warmup=7),
        mesh=Mesh(fsdp=-1), execution=Execution(dtype="float32"),
    )
"""


def run(**mesh) -> config.Run:
    return config.Run(
        name="x", model=TINY, objective=causal.Config(), train=config.Train(batch_size=8, seq_len=64),
        mesh=config.Mesh(**mesh), execution=config.Execution(remat="full", scan=True, dtype="float32"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def fsdp() -> ahead_of_time.Compiled:
    return ahead_of_time.compile_step(run(fsdp=8), targets.parse("cpu:8"))


def test_fsdp_moves_what_theory_says(fsdp) -> None:
    """Two all-gathers and one reduction of the layers' sharded weights a step, within 5 %, read from the compiled step.

    A CPU's compiler has no reduce-scatter: it writes an all-reduce of the whole gradient and a slice of it.
    """
    layers = 4 * 3 * (4 * 128 * 128 + 3 * 128 * 256)
    head, rows = 4 * 512 * 128, 4 * (8 // 8) * 64 * 128
    total = lambda *kinds: sum(c.bytes * c.times for c in fsdp.module.collectives if c.kind in kinds)  # noqa: E731
    assert total("all-gather") == pytest.approx(2 * layers + head, rel=0.01)
    assert total("all-reduce", "reduce-scatter") == pytest.approx(layers + head, rel=0.01)
    assert total("all-to-all") == 2 * rows  # of the embedding: those that were looked up, and their gradients
    assert {c.axes for c in fsdp.module.collectives} == {("fsdp",)}
    in_loops = [c for c in fsdp.module.collectives if c.times == 3 and c.bytes > 1000]
    assert sum(c.bytes * 3 for c in in_loops if c.kind == "all-gather") == pytest.approx(2 * layers, rel=0.05)


def test_fsdp_keeps_no_large_array_whole(fsdp) -> None:
    """What all layers' weights or optimizer state would take whole is never one array, and nothing was copied to
    every device because the partitioner knew no better."""
    assert fsdp.warnings == ()
    stacked = 4 * 3 * 128 * 256
    whole = [b for b in fsdp.module.buffers(50) if b.shape.startswith("f32[3,") and b.bytes >= stacked]
    assert whole == []


def test_arithmetic_agrees_with_the_compiler(fsdp) -> None:
    c = ahead_of_time.estimate(run(fsdp=8), targets.parse("cpu:8"))
    assert c.memory["parameters"] == fsdp.cost.memory["parameters"]
    assert c.memory["optimizer state"] == fsdp.cost.memory["optimizer state"]
    assert c.memory["gradients"] == fsdp.cost.memory["gradients"]
    assert c.flops == pytest.approx(fsdp.cost.flops, rel=0.05)
    assert c.model_flops == fsdp.cost.model_flops
    gathered = lambda c: sum(f.sent for f in c.flows if f.kind == "all-gather")  # noqa: E731
    assert gathered(c) == pytest.approx(gathered(fsdp.cost), rel=0.05)


def test_what_compilers_say_is_caught_and_not_lost() -> None:
    with ahead_of_time.capture_stderr() as said:
        os.write(2, b"[SPMD] Involuntary full rematerialization. of %x\n")
    assert said.splitlines() == ["[SPMD] Involuntary full rematerialization. of %x"]


def test_only_objectives_that_need_no_data_are_compiled() -> None:
    from jaxlm.models import bert
    from jaxlm.objectives import classify

    c = bert.Config(vocab=64, layers=1, width=16, heads=4, ffn=32, positions=16)
    one = config.Run(name="x", model=c, objective=classify.Config(labels=("a", "b")),
                     train=config.Train(batch_size=8, seq_len=16))  # fmt: skip
    with pytest.raises(ValueError, match="objective: classify makes batches from data"):
        ahead_of_time.compile_step(one, targets.parse("cpu:8"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def plain(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_plan_by_arithmetic_and_json(file, capsys) -> None:
    assert cli.main(["plan", str(file), "--target", "v5e:2x4", "--analytic", "--json"]) == 0
    found = plain(capsys)
    assert found["devices"] == 8 and found["fits"] and found["mesh"]["fsdp"] == 8
    assert found["seconds"]["step"] > 0 and 0 < found["mfu_causal"] < 1


def test_plan_compiles_for_the_machine_at_hand(file, capsys) -> None:
    assert cli.main(["plan", str(file), "--json"]) == 0
    out, text = capsys.readouterr()
    assert "compiled in" in text and "all-gather" in text and "losses.py:" in text
    found = json.loads(out)
    assert found["memory_bytes"]["total"] > found["memory_bytes"]["parameters"] > 0 and found["largest_arrays"]


def test_plan_says_what_does_not_fit(file, capsys) -> None:
    more = ["--model.width", "16384", "--model.layers", "64", "--model.ffn", "65536"]
    assert cli.main(["plan", str(file), "--target", "v5e:2x4", "--analytic", *more]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "said"), [
    (["--target", "v5e:3x5"], "jaxlm: --target: 'v5e:3x5' doesn't exist; nearest: v5e:4x4"),
    (["--target", "h100:8", "--analytic", "--mesh.fsdp", "3"], "mesh: fsdp 3 does not fit 8 devices"),
    (["--target", "h100:8", "--analytic", "--mesh.tensor", "8", "--mesh.fsdp", "1"],
     "jaxlm: mesh: blocks/k has 4 kv, which 8 devices of tensor do not divide"),
    (["--out", "x.py"], "jaxlm: --out: is for --search"),
])  # fmt: skip
def test_wrong_requests(file, capsys, more, said) -> None:
    assert cli.main(["plan", str(file), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_compiler(file, capsys, monkeypatch) -> None:
    monkeypatch.setattr("jaxlm.planning.targets.importlib.util.find_spec", lambda module: None)
    assert cli.main(["plan", str(file), "--target", "v5e:2x4"]) == 2
    assert 'pip install "jax[tpu]"' in capsys.readouterr().err


def test_search_writes_a_config_that_trains(file, tmp_path, capsys) -> None:
    best = tmp_path / "best.py"
    assert cli.main(["plan", str(file), "--target", "h100:8", "--search", "--out", str(best), "--json"]) == 0
    found, made, own = plain(capsys), config_io.load(best), config_io.load(file)
    assert found["layouts"] > 20 and found["ranked"][0]["layout"] == found["best"]
    assert mesh_search.Candidate(made, None).changes == found["best"]  # type: ignore[arg-type]
    same = dataclasses.replace(made, mesh=own.mesh, train=own.train, execution=own.execution)
    assert same == own
    assert cli.main(["plan", str(file), "--target", "h100:8", "--search", "--out", str(best)]) == 2
    said = capsys.readouterr()
    assert "exists; name another file" in said.err and "layouts" not in said.out  # before anything is searched


def test_candidates_fit_first_and_then_the_fastest() -> None:
    t = targets.parse("v5e:4x4")
    big = dataclasses.replace(TINY, vocab=32000, layers=32, width=4096, heads=32, kv_heads=16, head_width=128,
                              ffn=14336, positions=None)  # fmt: skip
    base = dataclasses.replace(run(fsdp=-1), model=big, train=config.Train(batch_size=128, seq_len=2048))
    every = mesh_search.candidates(base, t)
    fit = [plan_report.fits(c.cost, t) for c in every]
    assert fit[0] and fit == sorted(fit, reverse=True)
    times = [c.cost.times["step"] for c, ok in zip(every, fit, strict=True) if ok]
    assert times == sorted(times)
    assert {c.run.train.batch_size for c in every} == {128}
    gpus = targets.parse("h100:2x8")
    slow = dataclasses.replace(base, mesh=config.Mesh(data=1, fsdp=1, tensor=16))  # sums over nodes are waited for
    assert mesh_search.best_change(slow, gpus, ahead_of_time.estimate(slow, gpus)).startswith("mesh.")
    tight = dataclasses.replace(base, mesh=config.Mesh(fsdp=2, tensor=8))
    assert "now it fits" in mesh_search.best_change(tight, t, ahead_of_time.estimate(tight, t))


def test_tune_measures_and_writes_the_fastest(file, tmp_path, capsys) -> None:
    best = tmp_path / "best.py"
    assert cli.main(["tune", str(file), "--candidates", "1", "--steps", "1", "--out", str(best), "--json"]) == 0
    found = plain(capsys)
    assert len(found["measured"]) == 2 and all(m["seconds"] > 0 for m in found["measured"])
    assert found["best"] == min(found["measured"], key=lambda m: m["seconds"])["layout"]
    assert jax.tree.leaves(config_io.load(best).train.batch_size) == [8]


def test_networks_of_this_machine_have_no_times() -> None:
    assert roofline.combine(ahead_of_time.estimate(run(fsdp=8), targets.here()), targets.here(), {}).times == {}


KEEPING = ("ewc", "l2", "si", "lwf", "replay", "der")


def keeping(on: config.Mesh, methods: tuple[str, ...] = KEEPING) -> config.Run:
    """A run that keeps earlier texts, with a frozen table, which has no importances."""
    kept = Continual(methods, old=("stdlib",), replay=Replay(examples=8, share=0.5), der=Der(top=4))
    return dataclasses.replace(
        run(), mesh=on, continual=kept, optim=config.Optim(freeze=("embed",)),
        train=config.Train(batch_size=16, seq_len=64),
    )  # fmt: skip


@pytest.mark.parametrize(
    "on",
    [config.Mesh(), config.Mesh(fsdp=8), config.Mesh(fsdp=4, tensor=2), config.Mesh(fsdp=4, tensor=2, zero=1),
     config.Mesh(data=2, fsdp=4, zero=2)],
    ids=["data", "fsdp", "tensor", "zero1", "zero2"],
)  # fmt: skip
def test_what_is_kept_of_earlier_tasks_is_counted_as_it_is(on) -> None:
    """By arithmetic, beside the bytes that the real trees have on each device."""
    made = keeping(on)
    cost = ahead_of_time.estimate(made, targets.parse("cpu:8"))
    p = ahead_of_time.program_of(made)
    like = remember.kept_like(p)
    assert set(like) == {"ewc", "l2", "si", "teacher"} and p.mesh is not None
    assert set(like["ewc"]) == set(like["l2"]) == set(like["si"]) == set(penalty.Quadratic._fields)
    with mesh.on_mesh(p.mesh):
        zeros = lambda tree: jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), tree)  # noqa: E731
        real = jax.tree.leaves((zeros(like), zeros(p.abstract_state().tracks)))
    each = [sum(s.data.nbytes for x in real for s in x.addressable_shards if s.device == d) for d in jax.devices()]
    assert set(each) == {cost.memory[roofline.KEPT]}
    plain = ahead_of_time.estimate(dataclasses.replace(made, continual=Continual()), targets.parse("cpu:8"))
    assert plain.memory == {name: n for name, n in cost.memory.items() if name != roofline.KEPT}


def test_a_compiled_plan_counts_what_is_kept_and_the_rows_of_a_host() -> None:
    made, t = keeping(config.Mesh(fsdp=8), ("ewc", "lwf", "der")), targets.parse("cpu:8")
    found = plan.make(made, t)
    assert found.cost.memory[roofline.KEPT] == found.by_arithmetic.memory[roofline.KEPT] > 0
    memory = found.compiled.executable.memory_analysis()
    parts = ("parameters", "optimizer state", roofline.KEPT)
    batch = memory.argument_size_in_bytes - sum(found.cost.memory[part] for part in parts)
    assert 0 < batch < 2e5 < found.cost.memory[roofline.KEPT], "what the program is given besides is the batch alone"
    row = ahead_of_time.program_of(made).objective.full_example()
    assert found.host_bytes == 8 * (sum(np.asarray(x).nbytes for x in row.values()) + 64 * 4 * (4 + 4))
    bounded = dataclasses.replace(made.continual, replay=Replay(examples=0, tokens=100))
    assert plan.make(dataclasses.replace(made, continual=bounded), t, compiling=False).host_bytes is None


def test_a_first_run_that_notes_its_path_has_tracks_alone() -> None:
    made = dataclasses.replace(keeping(config.Mesh(fsdp=8)), continual=Continual(("si", "ewc")))
    trained = sum(s.size for s in jax.tree.leaves(ahead_of_time.program_of(made).abstract_state().params))
    assert ahead_of_time.estimate(made, targets.parse("cpu:8")).memory[roofline.KEPT] == pytest.approx(
        2 * 4 * trained / 8, rel=0.02
    )
