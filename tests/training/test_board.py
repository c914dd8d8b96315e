"""The board shows what run directories hold while they grow, to whoever may see it, and nothing else."""

import gzip
import http.client
import json
import os
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.commands import cli
from jaxlm.training.board import beside, status
from jaxlm.training.board import runs as module
from jaxlm.training.board.runs import Runs
from jaxlm.training.board.server import FILES, Server
from jaxlm.training.log import RunLog

MARKUP = "<img src=x onerror=alert(1)>"


def train(folder, steps, name="a run", **config):
    folder.mkdir(parents=True)
    grow(folder, 1, steps)
    values = {"name": name, "train": {"steps": 100}, "optim": {"lr": 1e-3}} | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def grow(folder, first, last):
    """Goes on with a log, as a run does that trains."""
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(first, last + 1):
            time = {"elapsed_s": float(step), "data_wait": 0.01, "unix": float(step)}
            line = {"kind": "train", "step": step, "loss": 4 / step, "tokens": 8 * step, "time": time}
            file.write(json.dumps(line) + "\n")


@contextmanager
def served(root, token="", **options):
    with Server(Runs(root, **options), port=0, token=token) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(server, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer, text


def values(server, path):
    answer, text = ask(server, path)
    assert answer.status == 200, text
    return json.loads(text)


# -------------------------------------------------------------------------------------------------------- what is shown


def test_what_is_new_since_a_cursor_is_all_that_comes(tmp_path):
    train(tmp_path / "a", 500)
    runs = Runs(tmp_path)
    first = runs.view("a")
    assert first["reset"] and first["whole"] == 1 and len(first["train"]["n"]) == 500
    assert first["config"]["optim.lr"] == "0.001"
    again = runs.view("a", first["cursor"])
    assert again["cursor"] == first["cursor"] and not again["train"]["n"] and "sections" not in again
    grow(tmp_path / "a", 501, 503)
    grown = runs.view("a", first["cursor"])
    assert grown["train"]["first"] == 500 and grown["train"]["step"] == [501, 502, 503] and not grown["reset"]
    assert [part["id"] for part in grown["sections"]] == ["summary"], "a section that is as it was isn't sent"
    assert len(json.dumps(grown)) < 4000 < len(json.dumps(first))
    assert Runs(tmp_path).view("a", grown["cursor"])["reset"] is False, "a board that was started anew knows it too"


def test_a_long_log_comes_in_few_buckets_that_are_replaced_when_they_double(tmp_path):
    train(tmp_path / "a", 2000)
    runs = Runs(tmp_path)
    first = runs.view("a")
    grow(tmp_path / "a", 2001, 2100)
    doubled = runs.view("a", first["cursor"])
    assert (doubled["train"]["size"], doubled["train"]["first"]) == (2, 0) and len(doubled["train"]["n"]) == 1050
    grow(tmp_path / "a", 2101, 2103)
    grown = runs.view("a", doubled["cursor"])
    assert (grown["train"]["first"], grown["train"]["step"], grown["train"]["n"]) == (1050, [2101, 2103], [2, 1])
    near = runs.zoom("a", "step", 100, 110)["train"]
    assert near["size"] == 1 and near["step"] == list(range(99, 112))


def test_a_log_that_is_not_read_yet_is_shown_from_lines_here_and_there(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TURN", 0.0)  # a look reads a megabyte
    folder = train(tmp_path / "a", 1)
    line = (folder / "metrics.jsonl").read_text()
    text = "".join(line.replace('"step": 1', f'"step": {step}') for step in range(2, 40_000))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text)
    runs = Runs(tmp_path)
    early = runs.view("a")
    assert early["whole"] == 0 and early["reset"] and not early["sections"], "it is shown before it is read"
    steps = early["train"]["step"]
    assert steps[0] < 100 and steps[-1] == early["brief"]["step"] == 39_999 and steps == sorted(steps)
    assert max(np.diff(steps)) < 200, "they stand all over the log"
    later = runs.view("a", early["cursor"])
    assert later["whole"] > early["whole"] and "train" not in later and not later["reset"]
    for _ in range(10):
        later = runs.view("a", later["cursor"])
        if later["reset"]:
            break
    assert later["sections"] and sum(later["train"]["n"]) > 20_000
    while later["whole"] < 1:
        later = runs.view("a", later["cursor"])
        assert not later["reset"]
    assert sum(runs.view("a")["train"]["n"]) == 39_999


def test_a_log_that_is_written_anew_is_sent_anew(tmp_path):
    """As when a run is continued from an earlier checkpoint."""
    train(tmp_path / "a", 50)
    runs = Runs(tmp_path)
    cursor = runs.view("a")["cursor"]
    with RunLog(tmp_path / "a", tensorboard=False, resume_step=20):
        pass
    found = runs.view("a", cursor)
    assert found["reset"] and found["train"]["step"] == list(range(1, 21))
    for nonsense in ("", "x", "1.2.3", "-1.2.3.4", f"{'9' * 40}.0.0.0"):
        assert runs.view("a", nonsense)["reset"]


def test_a_line_that_is_cut_is_waited_for_and_one_that_is_none_is_told(tmp_path):
    folder = train(tmp_path / "a", 3)
    line = '{"kind": "train", "step": 4, "loss": 0.5, "time": {}}'
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line[:20])
    runs = Runs(tmp_path)
    first = runs.view("a")
    assert first["train"]["step"] == [1, 2, 3] and first["whole"] == 1
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line[20:] + "\nnonsense\n" + line.replace("4", "5") + "\n")
    grown = runs.view("a", first["cursor"])
    assert grown["train"]["step"] == [4, 5]
    assert "line 5 is not a line of this log" in grown["brief"]["alerts"][0]


def logs(steps, pause=2.0, kind="train", **line):
    out = status.Logs("x", {"data": {"workers": 0}}, {})
    for step in range(1, steps + 1):
        out.add(
            {"kind": kind, "step": step, "loss": 1.0} | line | {"time": line.get("time", {}) | {"unix": pause * step}}
        )
    return out


def test_a_run_that_writes_nothing_any_more_has_stalled():
    running = logs(20)
    assert status.status(running, 40 + 59) == ("running", "")
    found = status.status(running, 40 + 61)
    assert found.state == "stalled" and "no line for 1 min 01 s, where one is due within 1 min 00 s" in found.says
    assert status.status(logs(20, pause=100), 2000 + 499).state == "running", "its pace is its own"
    assert status.status(logs(20, pause=100), 2000 + 501).state == "stalled"
    assert status.status(running, 46, stalled=5.0).state == "stalled"
    assert status.status(logs(1), 800).state == "running", "the first step may compile for long"
    running.add({"kind": "event", "step": 20, "name": "end", "reason": "finished"})
    assert status.status(running, 1e9) == ("finished", "finished")
    running.add({"kind": "event", "step": 20, "name": "more", "time": {"unix": 60}})
    assert status.status(running, 61).state == "running", "it was given more steps"


def test_alerts_tell_what_is_not_finite_bound_by_data_or_overfits():
    def told(found):
        return status.alerts(found, status.Status("running", ""))

    assert told(logs(20)) == []
    waits = logs(20, time={"data_wait": 0.45})
    assert told(waits) == ["bound by data: the loop waits for batches 45% of the time; raise data.workers from 0"]
    broken = logs(20)
    for step in (21, 22):
        broken.add({"kind": "train", "step": step, "loss": "NaN"})
    assert told(broken) == ["not finite: training loss at step 22, 2 times in all"]
    worse = logs(0)
    for step, loss in enumerate((2.0, 1.5, 1.6, 1.7, 1.8), 1):
        worse.add({"kind": "valid", "step": step, "loss": loss})
    assert "risen three times in a row, to 1.8; its lowest was 1.5 at step 2" in told(worse)[0]
    worse.add({"kind": "valid", "step": 6, "loss": 1.7})
    assert told(worse) == []


def test_runs_are_listed_from_the_ends_of_their_logs(tmp_path):
    train(tmp_path / "sweep" / "b", 3000, name=MARKUP)
    train(tmp_path / "a", 5)
    (tmp_path / "a" / "checkpoints" / "x").mkdir(parents=True)
    train(tmp_path / "a" / "checkpoints" / "hidden", 5)
    (tmp_path / "other").mkdir()
    found = {run["id"]: run for run in Runs(tmp_path).list()}
    assert found.keys() == {"a", "sweep/b"}
    assert (found["sweep/b"]["step"], found["sweep/b"]["steps"], found["sweep/b"]["name"]) == (3000, 100, MARKUP)
    assert [run["id"] for run in Runs(tmp_path / "a").list()] == ["a"], "a run's own folder is a board of one"


def test_a_stream_is_shown_beside_the_runs_of_its_stages(tmp_path):
    train(tmp_path / "stream" / "seed-0" / "1-a", 5)
    results = {
        "stages": ["a", "b<b>"], "seeds": [0], "methods": ["ewc"], "metrics": ["accuracy", "loss"], "seconds": {},
        "lower_is_better": [False, True], "matrices": [[[0.1, 9.0], [0.75, 8.0], [None, 2.5]]],
        "figures": {"average": [0.5, None, None]}, "warnings": ["b is small"],
    }  # fmt: skip
    (tmp_path / "stream" / "results.json").write_text(json.dumps(results))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"scores": 1}')
    runs = Runs(tmp_path)
    assert {run["id"]: run["kind"] for run in runs.list()} == {"stream": "stream", "stream/seed-0/1-a": "run"}
    shown = runs.view("stream")
    assert shown["brief"]["about"] == "2 stages · ewc · 1 seed"
    scores = next(part for part in shown["sections"] if part["id"] == "scores")["blocks"][0]
    assert scores["heads"] == ["", "a\naccuracy", "b<b>\nloss ↓"]
    _, after_a, after_b = scores["rows"]
    assert (after_a[1]["text"], after_a[1]["shade"], after_a[1]["edge"]) == ("0.7500", 1.0, True)
    assert after_b[1] == "–" and after_b[2]["shade"] == 1.0, "the lowest loss is the best"
    with pytest.raises(KeyError):
        runs.view("other")


# ------------------------------------------------------------------------------------------------------- who may see it


def test_the_page_and_its_files_come_with_a_strict_policy(tmp_path):
    train(tmp_path / "a", 5, name=MARKUP)
    with served(tmp_path) as server:
        for path in ("/", *(f"/page/{name}" for name in FILES)):
            answer, text = ask(server, path)
            assert answer.status == 200 and text
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert MARKUP not in ask(server, "/")[1].decode()
        [run] = values(server, "/api/runs")["runs"]
        assert run["name"] == MARKUP, "it is data; the page makes text of it"
        assert ask(server, "/api/runs")[0].headers["Content-Type"].startswith("application/json")


def test_answers_are_compressed_and_not_sent_twice(tmp_path):
    train(tmp_path / "a", 500)
    with served(tmp_path, now=lambda: 0.0) as server:
        plain, text = ask(server, "/api/run?run=a")
        packed, short = ask(server, "/api/run?run=a", **{"Accept-Encoding": "gzip, br"})
        assert packed.headers["Content-Encoding"] == "gzip" and gzip.decompress(short) == text
        assert len(short) < len(text) / 2 and "Content-Encoding" not in plain.headers
        tag = ask(server, "/api/runs")[0].headers["ETag"]
        same, nothing = ask(server, "/api/runs", **{"If-None-Match": tag})
        assert (same.status, nothing) == (304, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_nothing_but_get_is_answered(tmp_path, method):
    with served(tmp_path) as server:
        answer, _ = ask(server, "/api/runs", method, body=b"x" if method in ("POST", "PUT") else None)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET")
        assert ask(server, "/", "GET", body=b"x")[0].status == 400


def test_no_path_leaves_the_runs(tmp_path):
    outside = train(tmp_path / "outside" / "secret", 5, name="secret")
    root = tmp_path / "runs"
    train(root / "a", 5)
    (root / "linked").symlink_to(outside)
    (root / "again").symlink_to(root / "a")
    (root / "circle").symlink_to(root)
    (root / "file").mkdir()
    (root / "file" / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    os.mkfifo(root / "a" / "environment.json")
    (root / "b").mkdir()
    (root / "b" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1, "time": {}}\n')
    (root / "b" / "config.json").symlink_to(outside / "config.json")
    with served(root) as server:
        listed = {run["id"]: run["name"] for run in values(server, "/api/runs")["runs"]}
        assert listed == {"a": "a run", "b": "b"}
        assert values(server, "/api/run?run=b")["config"] == {}
        tricks = (
            "../outside/secret",
            "linked",
            "file",
            "a/../../outside/secret",
            "/etc",
            "%2e%2e/outside/secret",
            "a%00",
            ".",
            "",
        )
        for trick in tricks:
            assert ask(server, f"/api/run?run={trick}")[0].status == 404, trick
            assert ask(server, f"/api/zoom?run={trick}&axis=step&low=0&high=1")[0].status == 404, trick
        for path in ("/page/../server.py", "/page/%2e%2e/server.py", "/page/board.html", "/../../etc/passwd",
                     "//etc/passwd", "/a/metrics.jsonl", "/api/zoom?run=a&axis=__class__&low=0&high=1"):  # fmt: skip
            assert ask(server, path)[0].status == 404, path
        assert ask(server, "/api/zoom?run=a&axis=step&low=x&high=1")[0].status == 400
        assert ask(server, "/" + "a" * 5000)[0].status == 414


def test_names_of_other_sites_that_lead_here_are_refused(tmp_path):
    with served(tmp_path) as server:
        assert ask(server, "/api/runs", Host="evil.example:80")[0].status == 421
        for name in ("localhost:1", "127.0.0.1", "[::1]:8011"):
            assert ask(server, "/api/runs", Host=name)[0].status == 200


def test_a_token_is_needed_where_others_reach_the_board(tmp_path):
    train(tmp_path / "a", 5)
    with Server(Runs(tmp_path), "0.0.0.0", 0) as open_to_all:
        assert len(open_to_all.token) > 20 and open_to_all.address.endswith(f"/?token={open_to_all.token}")
    with served(tmp_path, token="só secret") as server:
        for headers in ({}, {"Cookie": "jaxlm_board=x"}, {"Authorization": "Bearer nearly"}):
            for path in ("/", "/api/runs", "/page/board.js", "/?token=wrong"):
                assert ask(server, path, **headers)[0].status == 401, (path, headers)
    with served(tmp_path, token="secret") as server:
        answer, _ = ask(server, "/?token=secret")
        assert (answer.status, answer.headers["Location"]) == (303, "/"), "the address that is shown has no token"
        cookie = answer.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert ask(server, "/api/runs", Cookie=f"other=1; {cookie.split(';')[0]}")[0].status == 200
        assert ask(server, "/api/runs", Authorization="Bearer secret")[0].status == 200
        assert ask(server, "/api/runs", Authorization="Bearer secret", Host="board.example")[0].status == 200


# -------------------------------------------------------------------------------------------------------- how it begins


def test_a_port_that_is_taken_is_said_with_the_remedy(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["board", str(tmp_path), "--port", port]) == 2
        assert f"--port {port}: " in (line := capsys.readouterr().err) and "--port 0" in line
    assert cli.main(["board", str(tmp_path / "none")]) == 2
    assert "RUNS_DIR: no folder" in capsys.readouterr().err
    assert cli.main(["board", str(tmp_path), "--stalled", "-1"]) == 2


def test_it_is_served_beside_a_run_by_a_process_that_ends_with_it(tmp_path):
    with beside.serving(tmp_path / "runs") as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        train(tmp_path / "runs" / "a", 5)
        answer, text = ask(SimpleNamespace(server_port=port), "/api/runs")
        assert answer.status == 200 and [run["id"] for run in json.loads(text)["runs"]] == ["a"]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "it is gone"
