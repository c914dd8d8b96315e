"""A model card is the `README.md` of a model: what it is, what it was made of, and under which licence."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = "start_card.md"
"""The card of the model that a run starts from, in the run directory."""


@dataclass(frozen=True)
class About:
    """It holds what is known of how a model came to be."""

    origin: str = ""
    """Sentences on it, as Markdown."""
    start: str = ""
    """The name of the model that it was trained from."""
    licence: str = ""
    """The licence that the card of that model states."""


def licence(folder: Path) -> str:
    """Returns the licence that the card in a model's folder states, or the card of the model that a run starts from;
    empty where there is none."""
    for name in (START, "README.md"):
        if not (folder / name).is_file():
            continue
        front = re.match(r"---\r?\n(.*?)\r?\n---", (folder / name).read_text("utf-8", errors="replace"), re.DOTALL)
        stated = dict(
            re.findall(r"^(license\w*):[ \t]*['\"]?([^'\"\r\n]+?)['\"]?[ \t]*\r?$", front[1] if front else "", re.M)
        )
        if "license" in stated:
            return (
                stated["license_name"]
                if stated["license"] == "other" and "license_name" in stated
                else stated["license"]
            )
    return ""


def keep(folder: Path, start: Path, stated: str = "") -> None:
    """Keeps the card of the model that a run starts from in the run directory, or the licence that its file states."""
    for name in (START, "README.md"):
        if (start / name).is_file():
            shutil.copyfile(start / name, folder / START)
            return
    if stated:
        (folder / START).write_text(f"---\nlicense: {stated}\n---\n", "utf-8")


def name_of(place: str) -> str:
    """Returns what to call a model or a source of data in public: a name on a hub as it is, a place here by its last
    part and, where that is a pattern, the folder that it is in; never the whole path."""
    first, plus, second = place.rpartition("+")
    if plus and first:
        return f"{name_of(first)}+{name_of(second)}"
    kind, colon, rest = place.partition(":")
    if colon and kind in ("hf", "tfds"):
        local = rest.startswith(("/", "~", "."))
        return f"{kind}:{name_of(rest)}" if local else place
    parts = [part for part in re.split(r"[/\\]", place) if part not in ("", ".", "..", "~")]
    return "/".join(parts[-2:] if parts and set(parts[-1]) & set("*?[") else parts[-1:]) or "a local folder"


def write(folder: Path, values: Mapping[str, Any], count: int, about: About) -> None:
    """Writes `README.md`. `values` are those of the `config.json`, `count` is the number of parameters."""
    architecture, name = (values.get("architectures") or ["AutoModel"])[0], folder.resolve().name
    front = [f"license: {about.licence}"] if about.licence else []
    hub = about.start.removeprefix("hf:").partition("@")[0]
    front += [f"base_model: {hub}"] if about.start.startswith("hf:") else []
    front += ["library_name: transformers", "tags:", f"- {values['model_type']}", "- jaxlm"]
    unknown = "Where its weights come from, what they were trained on and under which licence was not recorded."
    whose = f"{about.start or 'the model that it was made from'}"
    terms = f"The card of {whose} states the licence {about.licence}, which holds for what is made of it.\n\n"
    text = f"""# {name}

{architecture} with {count:,} parameters, written by jaxlm as {values["dtype"]} safetensors.

{about.origin or unknown}

{terms if about.licence else ""}```python
from transformers import {architecture}

model = {architecture}.from_pretrained("{name}")
```

jaxlm reads it too: `jaxlm eval {name}`.
Nothing about its quality is claimed here: evaluate it on your own task before you rely on it.
"""
    (folder / "README.md").write_text("\n".join(["---", *front, "---", "", text]), "utf-8")
