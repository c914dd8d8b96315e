"""Looks at the chat page in a real browser: keyboard alone, 320 pixels wide, hostile answers, no request elsewhere.

Run by hand, for CI has no browser: `python tests/system/chat_page.py FOLDER`. It needs `pip install playwright` and a
Chromium (the one named by CHROMIUM, or /usr/bin/chromium), and writes screenshots into the folder. The answers come
from an engine without a model.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import served

from jaxlm.inference.server.guard import Access

KEY = "a-key"
MARKDOWN = """# A heading

Some **bold**, *slanted*, `code` and ~~struck~~ text with a [link](https://example.org) and a
[trap](javascript:alert(1)).

1. first
2. second
   - inner *one*
   - inner two

> A quotation of `code`.

| name | value |
|---|---|
| a | 1 |
| b \\| c | 2 |

```python
def f(x: int) -> str:
    return "<b>" + str(x)  # a line that is much longer than a narrow window is wide, so that it scrolls
```

![picture](https://example.org/x.png) and snake_case_names stay."""
HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">
<a href="javascript:window.hacked=1">x</a> [y](javascript:window.hacked=1) [z](data:text/html,<script>) <https://ok.example>
`<b>` **<iframe src="https://evil.example">** ![p](https://evil.example/p.png)

```html
<script>window.hacked = 1</script>
```

| <svg onload="window.hacked=1"> | b |
|---|---|
| "><script>window.hacked=1</script> | x |
"""


def say(request: Any, sample: int) -> str:
    asked = bytes(i for i in request.prompt if i < 256).decode().rpartition("[user]")[2].removesuffix("[assistant]")
    return {"markdown": MARKDOWN, "hostile": HOSTILE, "long": "word " * 180}.get(asked, f"You said: {asked}")


def until(page: Page, condition: str) -> None:
    until_true(lambda: page.evaluate(condition))  # the page's policy lets no text become code, so it can't wait itself


def until_true(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.02)


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.textContent")


def tab_to(page: Page, name: str, most: int = 40) -> None:
    for _ in range(most):
        if focused(page) == name:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"the keyboard does not reach {name!r}")


def talk(page: Page) -> list[str]:
    return page.eval_on_selector_all(
        "#talk > li", "items => items.map(x => x.querySelector('.text, .plain').innerText)"
    )


def ready(page: Page) -> None:
    until(page, "!document.getElementById('send').disabled")


def by_keyboard(page: Page, made: served.Served) -> None:
    """Sends, edits, stops, sets and begins anew with the keyboard alone."""
    assert focused(page) == "say"
    page.keyboard.type("one")
    page.keyboard.press("Enter")
    ready(page)
    assert talk(page) == ["one", "You said: one"], talk(page)
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    ready(page)
    assert talk(page)[2:] == ["two\nlines", "You said: two\nlines"], talk(page)
    assert page.inner_text("#status").startswith("The answer is complete: You said: two"), "a screen reader is told"
    page.focus("#new")
    tab_to(page, "Edit")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.ariaLabel") == "Edit message"
    page.keyboard.press("Control+a")
    page.keyboard.type("changed")
    page.keyboard.press("Enter")
    ready(page)
    assert talk(page) == ["changed", "You said: changed"], "what followed is gone"
    page.focus("#new")
    tab_to(page, "Edit")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert talk(page) == ["changed", "You said: changed"] and focused(page) == "Edit"
    tab_to(page, "Answer again")
    page.keyboard.press("Enter")
    ready(page)
    assert talk(page) == ["changed", "You said: changed"]
    made.engine.pause = 0.02
    page.keyboard.type("long")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#talk > li:last-child .text').textContent.length > 20")
    assert page.get_attribute("#talk > li:last-child", "aria-busy") == "true"
    page.keyboard.press("Escape")
    ready(page)
    assert 20 < len(talk(page)[-1]) < 800 and "stopped" in page.inner_text("#talk > li:last-child .actions")
    made.engine.pause = 0
    until_true(lambda: not made.engine.live)
    page.focus("#new")
    tab_to(page, "Settings")
    page.keyboard.press("Enter")
    tab_to(page, "temperature")
    page.keyboard.type("0.5")
    tab_to(page, "max_tokens")
    page.keyboard.type("4")
    page.focus("#say")
    page.keyboard.type("short")
    page.keyboard.press("Enter")
    ready(page)
    assert talk(page)[-1].strip() == "You" and "cut off after 4 tokens" in page.inner_text(
        "#talk > li:last-child .actions"
    )
    assert made.asked.sampling.temperature == 0.5
    page.focus("#new")
    page.keyboard.press("Enter")
    assert talk(page) == [] and focused(page) == "say"
    page.focus("#max_tokens")
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.focus("#temperature")
    page.keyboard.press("Control+a")
    page.keyboard.type("-3")
    page.focus("#say")
    page.keyboard.type("x")
    page.keyboard.press("Enter")
    assert focused(page) == "temperature" and page.is_visible("#error"), "a wrong setting is told, and where it is"
    page.focus("#reset")
    page.keyboard.press("Enter")
    page.focus("#new")
    page.keyboard.press("Enter")


def ask(page: Page, text: str) -> None:
    page.fill("#say", text)
    page.click("#send")
    ready(page)


def answers_are_text(page: Page) -> None:
    """Shows hostile answers as text, and Markdown as elements."""
    ask(page, "hostile")
    assert page.evaluate("window.hacked") is None
    inner = page.locator("#talk > li:last-child .text")
    found = inner.evaluate("x => [...x.querySelectorAll('*')].map(e => e.tagName)")
    assert not {"SCRIPT", "IMG", "IFRAME", "SVG"} & set(found), found
    links = inner.evaluate("x => [...x.querySelectorAll('a')].map(a => a.href)")
    assert links and all(link.startswith("https://") for link in links), links
    assert "<script>window.hacked = 1</script>" in (inner.text_content() or "")
    page.click("#new")
    ask(page, "markdown")
    found = set(inner.evaluate("x => [...x.querySelectorAll('*')].map(e => e.tagName)"))
    wanted = {"H4", "STRONG", "EM", "CODE", "DEL", "A", "OL", "UL", "LI", "BLOCKQUOTE", "TABLE", "PRE"}
    assert wanted <= found and "IMG" not in found, wanted - found
    text = inner.text_content() or ""
    assert "snake_case_names" in text and 'return "<b>"' in text and "b | c" in text, text


def narrow(page: Page, folder: Path) -> None:
    """Fits into 320 pixels."""
    page.set_viewport_size({"width": 320, "height": 640})
    ask(page, "a-very-long-word-" * 12)
    for opened in (False, True):
        page.evaluate("x => { document.getElementById('settings').open = x[0]; }", [opened])
        size = page.evaluate("[document.documentElement.scrollWidth, document.querySelector('main').scrollWidth, "
                             "document.querySelector('main').clientWidth]")  # fmt: skip
        assert size[0] <= 320 and size[1] <= size[2], f"it scrolls sideways: {size}"
        for name in ("say", "send", "new", "model"):
            box = page.locator(f"#{name}").bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= 320 and box["y"] + box["height"] <= 640, (
                name,
                box,
            )
        page.screenshot(path=folder / f"chat_320_{'settings' if opened else 'talk'}.png")
    page.evaluate("document.getElementById('settings').open = false")
    page.set_viewport_size({"width": 1100, "height": 800})


def names_for_screen_readers(page: Page) -> None:
    """Gives every control a name, and every button a text."""
    unnamed = page.evaluate("""() => [...document.querySelectorAll('input, textarea, select, button')].filter(x =>
        !(x.labels?.length || x.textContent.trim() || x.ariaLabel)).map(x => x.outerHTML)""")
    assert not unnamed, unnamed
    assert page.evaluate("document.documentElement.lang") == "en" and page.locator("h1").count() == 1


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with served.fake(say, access=Access(keys=(KEY,)), limit=4096) as made, sync_playwright() as p:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(
            http_credentials={"username": "", "password": KEY}, viewport={"width": 1100, "height": 800}
        )
        page = context.new_page()
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: problems.append(f"error: {e}"))
        page.on(
            "request", lambda r: None if r.url.startswith((made.url, "data:")) else problems.append(f"asks {r.url}")
        )
        page.goto(made.url)
        until(page, "document.querySelector('#model option') !== null")
        names_for_screen_readers(page)
        by_keyboard(page, made)
        answers_are_text(page)
        page.screenshot(path=folder / "chat_wide.png")
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=folder / "chat_dark.png")
        page.emulate_media(color_scheme="light")
        narrow(page, folder)
        stranger = browser.new_context().request.get(made.url)
        assert stranger.status == 401, "without the key there is no page"
        browser.close()
    assert not problems, problems
    print(f"the chat page does what it should; screenshots are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
