"""Turns the bytes of a user's file into text, and JSON into values: all readers decode here and refuse alike.

Text is UTF-8. A byte-order mark in front of a file or of one of its lines is no part of the text and is removed.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MARK = "\ufeff"
_MARK = MARK.encode()
_WIDE = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def decode(data: bytes, where: str) -> str:
    """Returns text without a byte-order mark in front. Raises ValueError, which names `where`, if it isn't UTF-8."""
    check_narrow(data, where)
    try:
        return data.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(
            f"{where}: not UTF-8 at byte {error.start} (0x{byte:02x}): convert it (iconv -f latin1 -t utf-8, if that "
            "is its encoding)"
        ) from error


def check_narrow(data: bytes, where: str) -> None:
    """Raises ValueError, which names `where`, if a file's first bytes are those of UTF-16 or UTF-32."""
    if name := _wide(data):
        raise ValueError(f"{where}: {name.upper()}, where UTF-8 is due: convert it (iconv -f {name} -t utf-8)")


def _wide(data: bytes) -> str | None:
    """Returns the name of an encoding of 16 or 32 bits, by its mark, or without one by the zeros in its first bytes."""
    marked = next((name for mark, name in _WIDE.items() if data.startswith(mark)), None)
    zeros = "".join("0" if byte == 0 else "1" for byte in data[:4])
    return marked or {"0001": "utf-32be", "1000": "utf-32le", "0101": "utf-16be", "1010": "utf-16le"}.get(zeros)


def decode_line(data: bytes, where: str) -> str:
    """Returns a line's text without its end, which is a line feed alone or after a carriage return.

    Files joined end to end have byte-order marks in front of later lines too. Raises ValueError, which names `where`.
    """
    return decode(data.removesuffix(b"\n").removesuffix(b"\r"), where)


def read_text(path: str | Path) -> str:
    """Returns the text of a file. Raises ValueError, which names file and line, if it isn't UTF-8."""
    data = Path(path).expanduser().read_bytes()
    if not _wide(data):
        try:
            return data.decode("utf-8").removeprefix(MARK)
        except UnicodeDecodeError as error:
            at = data.rfind(b"\n", 0, error.start) + 1
            number = 1 + data.count(b"\n", 0, at)
            decode(data[at:].partition(b"\n")[0], f"{path}:{number}")
    return decode(data, str(path))


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields numbered lines of a file, which end at a line feed alone: other separators are part of a text.

    Raises ValueError, which names the file, if there are carriage returns instead of line feeds.
    """
    text = read_text(path)
    if "\n" not in text and "\r" in text.rstrip("\r"):
        raise ValueError(f"{path}: carriage returns alone end its lines: convert them (tr '\\r' '\\n')")
    for number, line in enumerate(text.split("\n"), 1):
        yield number, line.removesuffix("\r").removeprefix(MARK)


# ---------------------------------------------------------------------------------------------------------------- JSON


def parse_json(text: str, where: str, names: Iterable[str] | None = None) -> Any:
    """Returns the value of one line of JSON.

    Raises ValueError, which names `where`, for what isn't JSON or is nested too deeply, for an object with two fields
    of one name, and for half a surrogate pair, which no encoding can write: anywhere, or in the fields `names` alone.
    """
    try:
        value = _parse(text, where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON record: {error.msg} at column {error.colno}") from error
    if "\\u" in text:
        chosen = value if names is None or not isinstance(value, dict) else {n: value.get(n) for n in names}
        check_encodable(chosen, where)
    return value


def read_json(path: str | Path) -> Any:
    """Returns the value that a JSON file holds. Raises ValueError, which names the file, as `parse_json` does."""
    text = read_text(path)
    try:
        value = _parse(text, str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if "\\u" in text:
        for i, record in enumerate(value if isinstance(value, list) else [value]):
            check_encodable(record, f"{path}[{i}]")
    return value


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError(f"{where}: JSON is nested too deeply to be read; correct or remove it") from None
    except ValueError as error:  # two fields of one name, or a number of more digits than Python reads
        raise ValueError(f"{where}: {' '.join(str(error).split())}; correct it") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two fields are called {next(n for n in made if names.count(n) > 1)!r}")
    return made


def check_encodable(value: Any, where: str) -> None:
    """Raises ValueError, which names `where` and the field, if a text of a record holds half a surrogate pair."""
    for name, part in value.items() if isinstance(value, dict) else [("", value)]:
        try:
            json.dumps(part, ensure_ascii=False).encode("utf-8")
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            field = f"{name!a} holds " if name else "it holds "
            raise ValueError(f"{where}: {field}half a surrogate pair ({half}); correct or remove it") from error


def kind_of(value: Any) -> str:
    """Returns what a value is called in JSON, with its article, for error messages."""
    names = {bool: "true or false", type(None): "null", int: "a number", float: "a number", str: "a text",
             list: "a list", dict: "an object"}  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")
