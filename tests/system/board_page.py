"""The board in a real browser, while a run trains: its curves grow without a reload, keys are enough, nothing is asked
of any other place, and what a run says is never markup.

    python -m venv browser && browser/bin/pip install playwright   # anywhere; it need not hold jaxlm
    browser/bin/python tests/system/board_page.py --python .venv/bin/python --browser /usr/bin/chromium --shots shots

Without --browser Playwright's own Chromium is started (`playwright install chromium`). `--shots` keeps pictures of the
pages, to be looked at.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
MARKUP = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
CHART = "figure:has(h3:text-is('Training loss'))"


@contextmanager
def process(python: str, *arguments: str, cwd: Path) -> Iterator[subprocess.Popen]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [python, "-m", "jaxlm", *arguments], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True
    ) as it:
        try:
            yield it
        finally:
            it.kill()


def address_of(process: subprocess.Popen) -> str:
    """Waits for the line that says where a board is served."""
    assert process.stdout
    for line in process.stdout:
        if "http://" in line:
            return "http://" + line.split("http://")[1].split()[0]
    raise AssertionError("no address was printed")


def fake(folder: Path, name: str, steps: int, ended: bool, **config: Any) -> None:
    """Writes the logs of a run: one whose loss was NaN for a while, and whose texts are markup."""
    folder.mkdir(parents=True)
    unix = time.time() - steps
    lines: list[dict] = [{"kind": "sample", "step": 0, "prompt": MARKUP, "text": MARKUP, "time": {"unix": unix}}]
    for step in range(1, steps + 1):
        loss: Any = "NaN" if 30 <= step < 40 else 1 + 4 / (1 + step / 20) + 0.05 * (step % 7)
        when = {"unix": unix + step, "elapsed_s": float(step), "tokens_per_s": 900.0 + step % 9, "data_wait": 0.4}
        lines.append({"kind": "train", "step": step, "loss": loss, "lr": 1e-3, "tokens": 64 * step, "time": when})
        if step % 20 == 0:
            lines.append({"kind": "valid", "step": step, "loss": 2.0 - step / 200, "time": {"unix": unix + step}})
    if ended:
        lines.append({"kind": "event", "name": "end", "step": steps, "reason": "finished", "used": steps, "time": {}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"name": name, "out": "runs", "train": {"steps": steps}, "model": {"family": "llama"}} | config
    (folder / "config.json").write_text(json.dumps(values))


class Visit:
    """A page of its own context, with what went wrong on it and where it asked."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.origin = address.split("#")[0].rstrip("/")
        self.page.goto(address)

    def check(self) -> None:
        assert not self.faults, self.faults
        away = [url for url in self.asked if not url.startswith((self.origin, "data:"))]
        assert not away, away
        self.context.close()


def steps_shown(page: Page) -> int:
    """The last step that the curve of the training loss has."""
    return page.evaluate("charts.get('train/loss')?.plot?.data[0].at(-1) ?? 0")


def curves_grow(browser: Browser, address: str, run: subprocess.Popen, shots: Path) -> None:
    """A run that trains is shown, grows without a reload, is killed, and is shown as stalled."""
    visit = Visit(browser, address + "#run=live", viewport={"width": 1280, "height": 900})
    page = visit.page
    page.wait_for_selector(CHART, timeout=120_000)
    page.evaluate("window.isTheSame = true")
    seen = [steps_shown(page)]
    for _ in range(3):
        page.wait_for_function("last => (charts.get('train/loss')?.plot?.data[0].at(-1) ?? 0) > last", arg=seen[-1])
        seen.append(steps_shown(page))
    assert page.evaluate("window.isTheSame"), "the page was loaded again"
    assert page.locator("#about .state").inner_text() == "running"
    page.screenshot(path=shots / "training.png")
    os.kill(run.pid, signal.SIGKILL)
    page.wait_for_selector("#about .state.stalled", timeout=60_000)
    assert "stalled: no line for" in page.locator("#alerts").inner_text()
    page.screenshot(path=shots / "stalled.png")
    visit.check()
    print(f"a run that trains grew through the steps {seen}, and is shown as stalled since it was killed")


def texts_are_texts(browser: Browser, address: str, shots: Path) -> None:
    visit = Visit(browser, address + "#run=done", viewport={"width": 1280, "height": 900})
    page = visit.page
    page.wait_for_selector("#section-samples")
    assert page.locator("#title").inner_text() == MARKUP and page.title() == MARKUP
    assert page.locator("#section-samples pre").first.inner_text() == MARKUP + MARKUP
    assert page.locator("main img, #list img, main b:has-text('bold') b").count() == 0
    curve = page.evaluate("charts.get('train/loss').curves[0]")
    assert curve["main"][29:39] == [None] * 10 and len(curve["gaps"]) == 10, "NaN is a gap"
    assert "not finite: training loss at step 39, 10 times in all" in page.locator("#alerts").inner_text()
    page.screenshot(path=shots / "done.png", full_page=True)
    visit.check()
    print("names, texts and samples are shown as they are; NaN is a gap")


def keys_are_enough(browser: Browser, address: str, shots: Path) -> None:
    """All of it without a mouse, in dark colours."""
    visit = Visit(browser, address + "#run=done", viewport={"width": 1280, "height": 900}, color_scheme="dark")
    page = visit.page
    page.wait_for_selector(CHART + " canvas")

    def until(what: str, most: int = 80) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("what => document.activeElement.matches(what)", what):
                return
        raise AssertionError(f"no key leads to {what}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    until("[name=axis]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("state.axis") == "seconds"
    until("#smoothing")
    page.keyboard.press("Home")
    assert page.evaluate("state.smoothing") == 0
    until("#log")
    page.keyboard.press("Space")
    assert page.evaluate("state.log")
    until(".chart")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    told = page.locator("#live").inner_text()
    assert " s, " in told, told
    page.keyboard.press("+")
    page.wait_for_function("state.zoom !== null")
    page.keyboard.press("Escape")
    page.wait_for_function("state.zoom === null")
    page.screenshot(path=shots / "keys-dark.png")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.locator("#search").focus()
    page.keyboard.type("live")
    assert page.locator("#runs li").count() == 1
    until("#runs input", 4)
    page.keyboard.press("Space")
    page.wait_for_selector("#section-differences")
    assert page.evaluate("document.activeElement.matches('#runs input')"), "focus stays where it was"
    page.screenshot(path=shots / "compared-dark.png", full_page=True)
    visit.check()
    print(f"keys are enough; a chart says: {told}")


def mouse_zooms(browser: Browser, address: str) -> None:
    visit = Visit(browser, address + "#run=done", viewport={"width": 1280, "height": 1400})
    page = visit.page
    over = page.locator(CHART + " .u-over")
    over.wait_for()
    box = over.bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], middle)
    assert "step" in page.locator(CHART + " .legend").inner_text()
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=5)
    page.mouse.up()
    page.wait_for_function("state.zoom !== null")
    low, high = page.evaluate("state.zoom")
    assert 35 < low < 38 and 71 < high < 74, (low, high)
    page.wait_for_function("[...state.shown.values()][0].near !== null")
    page.mouse.dblclick(box["x"] + 20, middle)
    page.wait_for_function("state.zoom === null")
    visit.check()
    print("a mouse reads values, zooms in and out")


def narrow(browser: Browser, address: str, shots: Path) -> None:
    visit = Visit(browser, address + "#run=done&run=live", viewport={"width": 320, "height": 700}, has_touch=True)
    page = visit.page
    page.wait_for_selector("#section-differences")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320, "the page is wider than the window"
    page.screenshot(path=shots / "narrow.png", full_page=True)
    visit.check()
    print("320 pixels are enough")


def report_works_from_a_file(browser: Browser, file: Path, shots: Path) -> None:
    visit = Visit(browser, file.as_uri(), viewport={"width": 1280, "height": 900}, offline=True)
    page = visit.page
    page.wait_for_selector(CHART + " canvas")
    assert page.locator("#title").inner_text() == MARKUP
    assert page.locator("main img").count() == 0 and not page.locator("#list").is_visible()
    page.screenshot(path=shots / "report.png", full_page=True)
    assert visit.asked == [file.as_uri()] or all(url.startswith("data:") for url in visit.asked[1:]), visit.asked
    assert not visit.faults, visit.faults
    visit.context.close()
    print("report.html shows the same from a file, offline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--browser", default=None)
    parser.add_argument("--shots", type=Path, default=None)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, sync_playwright() as p:
        folder = Path(place)
        shots = a.shots.absolute() if a.shots else folder
        shots.mkdir(exist_ok=True)
        fake(folder / "runs" / "done", MARKUP, 120, ended=True, optim={"lr": 1e-3})
        subprocess.run([a.python, "-m", "jaxlm", "report", "runs/done"], cwd=folder, check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
        browser = p.chromium.launch(executable_path=a.browser, args=["--no-sandbox"])
        train = ("train", "tiny_llama", "--name", "live", "--train.steps", "100000", "--train.log-every", "1",
                 "--train.prompts", "--train.save-every", "0", "--train.eval-every", "50", "--out", "runs")  # fmt: skip
        board = ("board", "runs", "--port", "0", "--stalled", "8")
        with process(a.python, *board, cwd=folder) as server, process(a.python, *train, cwd=folder) as run:
            address = address_of(server)
            texts_are_texts(browser, address, shots)
            mouse_zooms(browser, address)
            report_works_from_a_file(browser, folder / "runs" / "done" / "report.html", shots)
            curves_grow(browser, address, run, shots)
            keys_are_enough(browser, address, shots)
            narrow(browser, address, shots)
        browser.close()
    print("all of it holds")


if __name__ == "__main__":
    main()
