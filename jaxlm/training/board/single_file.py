"""Puts the board's page, with what it shows, into one file that needs nothing else."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
STYLES = ("uPlot.min.css", "board.css")
SCRIPTS = ("uPlot.iife.min.js", "charts.js", "sections.js", "board.js")
"""In the order in which they need each other."""
LICENCE = "uPlot.LICENSE.txt"


def page(title: str, views: Sequence[dict[str, Any]]) -> str:
    """Returns a page that shows views as the board does. Only its own scripts may run in it, which are known by their
    sums, and it may ask nothing of any network."""
    scripts = [(PAGE / name).read_text("utf-8") for name in SCRIPTS]
    styles = [(PAGE / name).read_text("utf-8") for name in STYLES]
    sums = " ".join(f"'sha256-{_sum(text)}'" for text in scripts)
    looks = " ".join(f"'sha256-{_sum(text)}'" for text in styles)
    policy = f"default-src 'none'; script-src {sums}; style-src {looks}; img-src data:; base-uri 'none'"
    licence = (PAGE / LICENCE).read_text("utf-8").strip()
    head = [f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            *(f"<style>{text}</style>" for text in styles)]  # fmt: skip
    data = f'<script type="application/json" id="data">{inline(views)}</script>'
    codes = [f"<!-- uPlot:\n{licence}\n-->", data, *(f"<script>{text}</script>" for text in scripts)]
    parts = {
        "<!--HEAD-->": "\n".join(head),
        "<!--SCRIPTS-->": "\n".join(codes),
        "<!--TITLE-->": html.escape(title),
    }
    text = (PAGE / "board.html").read_text("utf-8")
    for mark, part in parts.items():
        text = text.replace(mark, part, 1)
    return text


def served() -> str:
    """Returns the page as a server sends it, whose scripts and styles are files beside it."""
    head = [f'<link rel="stylesheet" href="page/{name}">' for name in STYLES]
    scripts = [f'<script src="page/{name}" defer></script>' for name in SCRIPTS]
    text = (PAGE / "board.html").read_text("utf-8")
    text = text.replace("<!--HEAD-->", "\n".join([*head, *scripts]), 1).replace("<!--SCRIPTS-->", "", 1)
    return text.replace("<!--TITLE-->", "Runs", 1)


def inline(values: Any) -> str:
    """Returns values as JSON that nothing of can end the script or begin a comment that it stands in."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _sum(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
