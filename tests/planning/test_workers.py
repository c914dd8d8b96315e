"""What plans say of workers that train apart: bytes, seconds over a link, and what a parameter server needs."""

import dataclasses
import json

import pytest

from jaxlm.commands import cli
from jaxlm.core import config
from jaxlm.core.distributed import Distributed, Outer, Server
from jaxlm.models import llama
from jaxlm.objectives import causal
from jaxlm.planning import mesh_search, plan, targets
from jaxlm.training.distributed import compression

MODEL = llama.Config(vocab=512, layers=4, width=128, heads=4, kv_heads=4, head_width=32, ffn=256)
NODES = targets.parse("h100:2x8")


def a_run(method="diloco", replica=2, **distributed) -> config.Run:
    return config.Run(
        "x", MODEL, causal.Config(), train=config.Train(batch_size=32, seq_len=64),
        mesh=config.Mesh(replica=replica, fsdp=-1), execution=config.Execution(remat="full"),
        distributed=Distributed(method, **distributed),
    )  # fmt: skip


def planned(run: config.Run, link=None, t=NODES) -> plan.Plan:
    return plan.make(run, t, compiling=False, link=link)


def numbers(run: config.Run) -> int:
    with_all = planned(dataclasses.replace(run, distributed=Distributed("diloco", workers=2)))
    return round(with_all.exchange.sent_by_worker / 4)  # two replicas: 2 (R - 1) / R = 1


@pytest.mark.parametrize("kind", ["none", "bfloat16", "int8", "float4"])
def test_seconds_follow_from_bytes_and_the_link(kind) -> None:
    made = planned(a_run(compress=kind, every=100), link=10)
    e, size = made.exchange, compression.size(kind, numbers(a_run()))
    assert e.sent_by_worker == pytest.approx(size, rel=1e-3) and e.sent == pytest.approx(size / 8, rel=1e-3)
    assert e.seconds == pytest.approx(size * 8 / 10e9, rel=1e-3)
    assert e.share(made.seconds) == pytest.approx(e.seconds / (100 * made.seconds + e.seconds))
    assert planned(a_run()).exchange.link == 8 * NODES.chip.network  # each GPU of a node has a card of its own


def test_four_replicas_send_more_than_two() -> None:
    two, four = (planned(a_run(replica=n, compress="int8")).exchange for n in (2, 4))
    assert four.sent_by_worker == pytest.approx(3 * two.sent_by_worker)
    two, four = (planned(a_run(replica=n)).exchange for n in (2, 4))
    assert four.sent_by_worker == pytest.approx(1.5 * two.sent_by_worker)


def test_an_exchange_that_overlaps_is_waited_for_only_where_it_takes_longer_than_a_step() -> None:
    at_once = planned(a_run(every=8, fragments=4), link=1).exchange
    late = planned(a_run(every=8, fragments=4, overlap=1), link=1).exchange
    assert at_once.waited(1.0) == at_once.seconds == late.seconds
    assert late.waited(1.0) == 0 and late.share(1.0) == 0
    assert late.waited(late.seconds / 8) == pytest.approx(late.seconds / 2, rel=0.05)


def test_a_parameter_server() -> None:
    run = a_run("server", replica=1, workers=4, compress="int8", every=50)
    node = targets.parse("h100:8")
    made, count = planned(run, link=1, t=node), numbers(a_run())
    e, push, pull = made.exchange, compression.size("int8", count), 4 * count
    assert (e.sent_by_worker, e.received_by_worker, e.server_sent) == (push, pull, 4 * pull)
    assert e.server_bytes == 3 * 4 * count  # weights, momentum, the sum of a round
    assert e.seconds == pytest.approx(4 * (push + pull) * 8 / 1e9)  # all share the server's link
    assert made.cost.tokens == 32 // 4 * 64
    free = dataclasses.replace(run.distributed, server=Server("async"), outer=Outer("average"))
    alone = planned(dataclasses.replace(run, distributed=free), link=1, t=node).exchange
    assert alone.server_bytes == 4 * count and alone.seconds == pytest.approx(e.seconds / 4)


def test_a_search_keeps_the_replicas_that_workers_train_on() -> None:
    every = mesh_search.candidates(a_run(), NODES)
    assert every and {c.run.mesh.replica for c in every} == {2}


CONFIG = """
from jaxlm import Mesh, Run, Train
from jaxlm.core.distributed import Distributed
from jaxlm.models import llama
from jaxlm.objectives import causal

def config():
    return Run(
        name="apart", model=llama.Config(vocab=256, layers=2, width=32, heads=4, kv_heads=4, head_width=8, ffn=64),
        objective=causal.Config(), train=Train(batch_size=16, seq_len=16), mesh=Mesh(replica=2, fsdp=-1),
        distributed=Distributed("diloco", every=10, compress="float4"),
    )
"""


def test_the_command(tmp_path, capsys) -> None:
    file = tmp_path / "apart.py"
    file.write_text(CONFIG)
    asked = ["plan", str(file), "--target", "h100:2x8", "--analytic"]
    assert cli.main([*asked, "--link", "2", "--json"]) == 0
    out, text = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])["exchange"]
    assert found["workers"] == 2 and found["link_bytes_per_s"] == 2.5e8
    assert found["seconds"] == pytest.approx(found["bytes_sent_worker"] / 2.5e8)
    assert 0 < found["share_waited"] < 1
    assert "every 10 steps each of 2 workers sends" in text and "of a round's" in text
    for more, said in (
        (["--link", "2", "--search"], "--link: is for one mesh, not for --search"),
        (["--link", "2", "--distributed.method", "none"], "--link: is for workers that train apart"),
        (
            ["--distributed.method", "server", "--mesh.replica", "1"],
            "distributed.workers: say into how many shards",
        ),
    ):
        assert cli.main([*asked, *more]) == 2
        assert said in capsys.readouterr().err
