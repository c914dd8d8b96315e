"""How fast the board answers, how much it sends, and how fluid its page stays, by the length of a run's log.

    browser/bin/python benchmarks/board.py --python .venv/bin/python --browser /usr/bin/chromium

A log has 16 numbers a line. Measured on a server in a process of its own: the first answer to a page that knows
nothing, all answers until the log is read, a look when ten lines are new, a look when nothing is, a zoom into a
hundredth; seconds of this client, and bytes as sent (gzip). In a browser (needs Playwright): the seconds until a curve
stands there and until it has all points, and the milliseconds between frames while a pointer moves over a chart and
lines keep coming. The limit beside it: the seconds that Python's json takes to read the same lines.
"""

import argparse
import gzip
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from worker import machine, save, table

ROOT = Path(__file__).parents[1]
FRAMES = """async () => {
  const gaps = [];
  let last = performance.now();
  const until = last + 6000;
  await new Promise((done) => {
    const step = (now) => { gaps.push(now - last); last = now; now < until ? requestAnimationFrame(step) : done(); };
    requestAnimationFrame(step);
  });
  return gaps.slice(1);
}"""


def lines(first: int, last: int) -> str:
    rng = random.Random(first)
    out = []
    for step in range(first, last + 1):
        loss = 4 / (1 + step / 20_000) + 1.5 + rng.gauss(0, 0.1)
        line = {"kind": "train", "step": step, "accuracy": 0.3 + 0.1 * rng.random(), "finite": 1.0, "nll": loss,
                "grad_norm": abs(rng.gauss(1, 0.3)), "loss": loss, "lr": 3e-4 * math.cos(step / 1e6),
                "tokens": 4096 * step, "weight/tokens": 4096.0,
                "time": {"tokens_per_s": 9e4 + rng.gauss(0, 3e3), "step_s": 0.045, "data_wait": 0.02, "overhead": 0.01,
                         "mfu_causal": 0.41, "cpu": 1.5, "memory_bytes": 2.1e9, "eta_s": 1e4, "elapsed_s": 0.05 * step,
                         "unix": time.time()}}  # fmt: skip
        out.append(json.dumps(line))
    return "\n".join(out) + "\n"


def ask(address: str) -> tuple[float, int, dict[str, Any]]:
    """Returns the seconds of an answer, its bytes as sent, and what it says."""
    before = time.perf_counter()
    request = urllib.request.Request(address, headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request) as answer:
        body, packed = answer.read(), answer.headers.get("Content-Encoding") == "gzip"
    seconds = time.perf_counter() - before
    return seconds, len(body), json.loads(gzip.decompress(body) if packed else body)


def answers(address: str, log: Path, count: int) -> dict[str, float]:
    run = f"{address}api/run?run=long&since="
    started = time.perf_counter()
    seconds, sent, view = ask(run)
    out = {"first_s": seconds, "first_kB": sent / 1e3, "first_share": view["whole"], "answers": 1}
    while view["whole"] < 1:
        _, more, view = ask(run + view["cursor"])
        sent += more
        out["answers"] += 1
    out |= {"whole_s": time.perf_counter() - started, "whole_kB": sent / 1e3}
    seconds, sent, _ = ask(run)
    out |= {"again_s": seconds, "again_kB": sent / 1e3}
    looks, idle = [], []
    for turn in range(9):
        with open(log, "a") as file:
            file.write(lines(count + 10 * turn + 1, count + 10 * turn + 10))
        looks.append(ask(run + view["cursor"]))
        view = looks[-1][2]
        idle.append(ask(run + view["cursor"]))
    for name, each in (("new", looks), ("idle", idle)):
        out |= {f"{name}_ms": 1e3 * statistics.median(x[0] for x in each),
                f"{name}_kB": statistics.median(x[1] for x in each) / 1e3}  # fmt: skip
    seconds, sent, _ = ask(f"{address}api/zoom?run=long&axis=step&low={count / 2}&high={count / 2 + count / 100}")
    seconds_of_list = statistics.median(ask(f"{address}api/runs")[0] for _ in range(5))
    return out | {"zoom_ms": 1e3 * seconds, "zoom_kB": sent / 1e3, "list_ms": 1e3 * seconds_of_list}


def frames(browser: Any, address: str, log: Path, count: int) -> dict[str, float]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    started = time.perf_counter()
    page.goto(f"{address}#run=long")
    page.wait_for_selector("figure canvas")
    first = time.perf_counter() - started
    page.wait_for_function("[...state.shown.values()][0].whole >= 1", timeout=300_000)
    page.wait_for_timeout(300)
    whole = time.perf_counter() - started
    ended = threading.Event()

    def grow() -> None:
        at = count + 1000
        while not ended.wait(0.5):
            with open(log, "a") as file:
                file.write(lines(at, at + 9))
            at += 10

    writer = threading.Thread(target=grow)
    writer.start()
    box = page.locator("figure .u-over").nth(1).bounding_box()
    page.evaluate("""([x, y, w]) => { // a pointer that moves sixty times a second
      const over = document.elementFromPoint(x + w / 2, y), start = performance.now();
      setInterval(() => over.dispatchEvent(new MouseEvent("mousemove",
        {bubbles: true, clientX: x + w * (0.5 + 0.45 * Math.sin((performance.now() - start) / 400)), clientY: y})), 16);
    }""", [box["x"], box["y"] + box["height"] / 2, box["width"]])  # fmt: skip
    gaps = sorted(page.evaluate(FRAMES))
    ended.set()
    writer.join()
    points = page.evaluate("charts.get('train/loss').plot.data[0].length")
    page.close()
    return {"page_first_s": first, "page_whole_s": whole, "points": points, "frame_ms": statistics.median(gaps),
            "frame_p99_ms": gaps[int(0.99 * len(gaps))], "frame_max_ms": gaps[-1]}  # fmt: skip


def measure(python: str, count: int, browser: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs" / "long"
        folder.mkdir(parents=True)
        log = folder / "metrics.jsonl"
        with open(log, "w") as file:
            for first in range(1, count + 1, 10_000):
                file.write(lines(first, min(count, first + 9999)))
        (folder / "config.json").write_text('{"name": "long", "train": {"steps": 2000000}}')
        out = {"lines": count, "MB": log.stat().st_size / 1e6}
        before = time.perf_counter()
        with open(log, "rb") as file:
            for line in file:
                json.loads(line)
        out["json_s"] = time.perf_counter() - before
        command = [python, "-m", "jaxlm", "board", str(folder.parent), "--port", "0"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                address = "http://" + server.stdout.readline().split("http://")[1].split()[0]
                out |= answers(address, log, count)
                status = Path(f"/proc/{server.pid}/status").read_text()
                out["server_MB"] = int(status.split("VmRSS:")[1].split()[0]) / 1e3
                if browser is not None:
                    out |= frames(browser, address, log, count)
            finally:
                server.kill()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--browser", default=None)
    a = parser.parse_args()
    about = machine()
    if a.browser:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as p:
            chromium = p.chromium.launch(executable_path=a.browser, args=["--no-sandbox"])
            rows = [measure(a.python, count, chromium) for count in a.lines]
            chromium.close()
    else:
        rows = [measure(a.python, count, None) for count in a.lines]
    for name in rows[0]:
        print(
            table([[name, *(row[name] for row in rows)]], ["", *(f"{row['lines']:,}" for row in rows)]).splitlines()[-1]
        )
    print(save("board", {"machine": about, "rows": rows}))


if __name__ == "__main__":
    main()
