"""Text from anywhere: the standard library, files, JSONL, Parquet and TFDS become keyed documents, cut into shards."""

import dataclasses
import glob
import hashlib
import importlib
import io
import itertools
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "text", "md", "rst", "tex", "html", "xml", "csv", "tsv", "en", "de", "fr", "zh"),
        *(
            "py",
            "pyi",
            "c",
            "h",
            "cc",
            "cpp",
            "hpp",
            "cu",
            "rs",
            "go",
            "java",
            "kt",
            "js",
            "ts",
            "rb",
            "pl",
            "sh",
            "lua",
        ),
        *("r", "jl", "scala", "sql", "toml", "yaml", "yml", "cfg", "ini"),
    )
)
GROUPS = 64  # small files are grouped into about so many shards of similar size
JSONL_BYTES = 32 << 20  # an uncompressed JSONL file is cut into stretches of about this size
TFDS_SHARDS = 64
REMEDY = {
    "tensorflow_datasets": "tensorflow-datasets",
    "array_record": "array-record",
    "pyarrow.parquet": "pyarrow",
    "zstandard": "zstandard",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with a key that is the same on every machine."""

    key: str
    text: str
    second: str | None = None
    """The other text of a pair."""

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.second is None else (self.text, self.second)


Field = str | tuple[str, str]  # of records: the one that holds the text, or the two that hold a pair of texts


@dataclasses.dataclass(frozen=True)
class Shard:
    """A picklable unit of work: whole files, or rows/bytes `start` to `stop` of one file or data set."""

    kind: str
    name: str
    paths: tuple[str, ...]
    keys: tuple[str, ...]  # one for each path, relative
    field: Field = "text"
    start: int = 0
    stop: int = 0
    stamp: str = ""  # changes when the content does: sizes and modification times
    size: int = 0  # bytes, or rows where bytes aren't known
    skipped: int = 0  # files left out because they aren't UTF-8 (standard library only)


def shards(source: str, *, field: Field = "text") -> tuple[Shard, ...]:
    """Cut a source into units of work, in an order that depends on the names alone.

    `source` is `stdlib`, a file, a folder, a glob, `tfds:NAME/CONFIG[:split]` or `tfds:/prepared/folder[:split]`; for
    pairs of texts also the `STEM` of two files `STEM.FIELD` that hold a text a line.
    """
    if not source:
        raise ValueError("data source is empty: name a file, a folder, a glob, 'stdlib' or 'tfds:NAME'")
    if isinstance(field, tuple) and any(file.is_file() for file in _sides(source, field)):
        found = _parallel_shards(source, field)
    elif source == "stdlib":
        found = _stdlib_shards(field)
    elif source.startswith("tfds:"):
        found = _tfds_shards(source, field)
    else:
        root, files = _expand(source)
        by_kind: dict[str, list[Path]] = {}
        for file in files:
            by_kind.setdefault(_kind_of(file), []).append(file)
        found = [shard for kind in sorted(by_kind) for shard in CUTTERS[kind](root, by_kind[kind], field)]
    if not sum(shard.size for shard in found):
        raise ValueError(f"data source {source!r} is empty: it holds no text at all")
    return tuple(dataclasses.replace(shard, name=f"{i:05d}-of-{len(found):05d}") for i, shard in enumerate(found))


def read(shard: Shard) -> Iterator[Document]:
    """The documents of one shard, in order; those without a single character, or half a pair, are left out."""
    try:
        yield from (document for document in READERS[shard.kind](shard) if all(document.texts))
    except OSError as error:
        raise ValueError(f"{error.filename or shard.paths[0]} can't be read: {error.strerror or error}") from error


def documents(source: str, *, field: Field = "text") -> Iterator[Document]:
    """All documents of a source, shard after shard."""
    for shard in shards(source, field=field):
        yield from read(shard)


def held_out(key: str, share: float) -> bool:
    """Whether a document belongs to validation: a hash of its key decides, so every machine agrees."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


# --------------------------------------------------------------------------------------------- which files, which kind


def _kind_of(file: Path) -> str:
    name = file.name.lower()
    for suffix, kind in SUFFIX_KINDS.items():
        if name.endswith(suffix):
            return kind
    if file.suffix.lower() in TEXT_SUFFIXES:
        return "text"
    raise ValueError(
        f"data source {file} is of an unknown kind: known are {', '.join(SUFFIX_KINDS)} and text such as .txt .md .py"
    )


def _expand(source: str) -> tuple[Path, list[Path]]:
    """The files behind a path or glob, sorted, and the folder that keys are relative to."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in TEXT_SUFFIXES and f.is_file()]
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not files:
            raise ValueError(
                f"data source {source!r} holds no text files; for others give a glob, e.g. '{path}/*.jsonl'"
            )
        return path, files
    if path.is_file():
        return path.parent, [path]
    if not glob.has_magic(source):
        raise ValueError(
            f"data source {source!r} does not exist: give a file, a folder, a glob, 'stdlib' or 'tfds:NAME'"
        )
    files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
    if not files:
        raise ValueError(
            f"data source {source!r} matches no file: check the pattern (quote it, so that the shell leaves it alone)"
        )
    plain = path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))]
    return Path(*plain), files


def _stamp(files: Iterable[Path]) -> str:
    parts = ((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()


def _file_shard(kind: str, root: Path, files: list[Path], field: Field, **more: Any) -> Shard:
    more.setdefault("size", sum(f.stat().st_size for f in files))
    keys = tuple(f.relative_to(root).as_posix() for f in files)
    paths = tuple(str(f.absolute()) for f in files)
    return Shard(kind, "", paths, keys, field, stamp=_stamp(files), **more)


def _module(name: str) -> Any:
    """Import an optional reader only when its format is met."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this data source needs {REMEDY[name]}: pip install {REMEDY[name]} ({error})") from error


# ---------------------------------------------------------------------------------------------------------- text files


def _text_shards(root: Path, files: list[Path], field: Field) -> list[Shard]:
    """Neighbouring files grouped until a group holds its share of the bytes."""
    if isinstance(field, tuple):
        raise ValueError(
            f"data source {files[0]} is plain text, which has no fields {field[0]!r} and {field[1]!r}: give JSONL, or "
            f"the stem of two files STEM.{field[0]} and STEM.{field[1]} with a text a line"
        )
    sizes = [f.stat().st_size for f in files]
    share = max(sum(sizes) / GROUPS, 1)
    groups: list[list[Path]] = []
    total = 0
    for file, size in zip(files, sizes, strict=True):
        if not groups or total >= share * len(groups):
            groups.append([])
        groups[-1].append(file)
        total += size
    return [_file_shard("text", root, group, field) for group in groups]


def _read_text(shard: Shard) -> Iterator[Document]:
    for key, path in zip(shard.keys, shard.paths, strict=True):
        # Bytes, not text mode: universal newlines would change what is learnt and scored.
        try:
            yield Document(key, Path(path).read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 at byte {error.start}: convert it (iconv -t utf-8) or leave it out"
            ) from error


def _stdlib_shards(field: Field) -> list[Shard]:
    """Python's own library as a corpus that every machine has; a few test files are in other encodings on purpose."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, skipped = [], 0
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(file.relative_to(root).parts):
            continue
        try:
            file.read_bytes().decode("utf-8")
            files.append(file)
        except UnicodeDecodeError:
            skipped += 1
    if not files:
        raise ValueError(f"data source 'stdlib': {root} holds no .py files; this Python came without its sources")
    first, *rest = _text_shards(root, files, field)
    return [dataclasses.replace(first, skipped=skipped), *rest]


# ------------------------------------------------------------------------------------------------------ parallel files


def _sides(stem: str, ends: tuple[str, str]) -> list[Path]:
    return [Path(f"{stem}.{end}").expanduser() for end in ends]


def _parallel_shards(stem: str, field: tuple[str, str]) -> list[Shard]:
    """Two files whose lines belong together, cut into stretches of lines."""
    files = _sides(stem, field)
    for file in files:
        if not file.is_file():
            raise ValueError(f"data source {stem!r}: {file} is missing; pairs of texts need a file for each side")
    first, second = (_count_lines(file) for file in files)
    if first != second:
        raise ValueError(
            f"data source {stem!r}: {files[0]} has {first} lines and {files[1]} {second}; line i must belong to line i"
        )
    pieces = max(1, sum(f.stat().st_size for f in files) // JSONL_BYTES)
    cuts = [first * i // pieces for i in range(pieces + 1)]
    return [
        _file_shard("parallel", files[0].parent, files, field, start=start, stop=stop, size=stop - start)
        for start, stop in itertools.pairwise(cuts)
    ]


def _count_lines(path: Path) -> int:
    """Lines as `_read_parallel` sees them: "\\n" alone ends one, and the last may lack it."""
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _read_parallel(shard: Shard) -> Iterator[Document]:
    with open(shard.paths[0], "rb") as first, open(shard.paths[1], "rb") as second:
        pairs = itertools.islice(zip(first, second, strict=True), shard.start, shard.stop)
        for number, lines in enumerate(pairs, shard.start):
            texts = []
            for path, line in zip(shard.paths, lines, strict=True):
                try:
                    texts.append(line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}:{number + 1}: not UTF-8: convert it (iconv -t utf-8)") from error
            yield Document(f"{shard.keys[0]}@{number}", *texts)


# --------------------------------------------------------------------------------------------------------------- JSONL


def _jsonl_shards(root: Path, files: list[Path], field: Field) -> list[Shard]:
    found = []
    for file in files:
        size = file.stat().st_size
        pieces = max(1, size // JSONL_BYTES) if file.suffix.lower() not in OPENERS else 1
        cuts = [size * i // pieces for i in range(pieces + 1)]
        for start, stop in itertools.pairwise(cuts):
            found.append(_file_shard("jsonl", root, [file], field, start=start, stop=stop, size=stop - start))
    return found


def _open_gzip(path: str) -> Any:
    return importlib.import_module("gzip").open(path, "rb")


class _Zstd(io.RawIOBase):
    """Zstandard frames as a file; the library's own takes a file that was cut off for one that ends."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed in `close`)
        self._frame: Any = None
        self._packed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(1 << 16)
            if not self._packed and self._frame:
                raise EOFError("it ends in the middle of a frame")
            if not self._packed:
                return 0
            self._frame = self._frame or _module("zstandard").ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstd(path: str) -> Any:
    return io.BufferedReader(_Zstd(path), 1 << 20)


OPENERS: dict[str, Callable[[str], Any]] = {".gz": _open_gzip, ".zst": _open_zstd}


def _read_jsonl(shard: Shard) -> Iterator[Document]:
    """Lines that begin in [start, stop); a key is the line's byte offset in the decompressed file."""
    (path,), (key,) = shard.paths, shard.keys
    opener = OPENERS.get(Path(path).suffix.lower())
    damage = _damage(path)
    with opener(path) if opener else open(path, "rb") as file:
        at = 0
        if shard.start:
            file.seek(shard.start - 1)
            at = shard.start - 1 + len(file.readline())
        lines = iter(file)
        while opener or at < shard.stop:
            try:
                line = next(lines, b"")
            except damage as error:
                raise ValueError(f"{path} is damaged after byte {at} of its text: {error}") from error
            if not line:
                return
            if line.strip():
                yield Document(f"{key}@{at}", *_json_texts(line, shard.field, path, at))
            at += len(line)


def _damage(path: str) -> tuple[type[BaseException], ...]:
    """What the decompressors raise."""
    more = (_module("zstandard").ZstdError,) if path.lower().endswith(".zst") else ()
    return (OSError, EOFError, zlib.error, *more)


def _names(field: Field) -> tuple[str, ...]:
    return (field,) if isinstance(field, str) else field


def _json_texts(line: bytes, field: Field, path: str, at: int) -> list[str]:
    try:
        record = json.loads(line)
    except ValueError as error:  # broken JSON and broken UTF-8 alike
        raise ValueError(f"{path}:{_line_number(path, at)}: not a JSON record: {error}") from error
    names = _names(field)
    if not isinstance(record, dict):
        raise ValueError(
            f"{path}:{_line_number(path, at)}: a {type(record).__name__}, where an object with {names[0]!r} is due"
        )
    for name in names:
        if not isinstance(record.get(name), str):
            where = f"{path}:{_line_number(path, at)}"
            raise ValueError(_missing(where, name, [name for name, value in record.items() if isinstance(value, str)]))
        try:
            record[name].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}:{_line_number(path, at)}: {name!r} holds half a surrogate pair: {error.reason}"
            ) from error
    return [record[name] for name in names]


def _line_number(path: str, at: int) -> int:
    """Only on the way to an error: count the lines before byte `at` of the decompressed file."""
    opener = OPENERS.get(Path(path).suffix.lower())
    number = 1
    with opener(path) if opener else open(path, "rb") as file:
        while at > 0 and (block := file.read(min(at, 1 << 20))):
            number += block.count(b"\n")
            at -= len(block)
    return number


def _missing(where: str, field: str, there: Iterable[str]) -> str:
    return f"{where}: no text field {field!r}; text fields there: {', '.join(sorted(there)) or 'none'}"


# ------------------------------------------------------------------------------------------------------------- Parquet


def _parquet_file(path: str | Path) -> Any:
    try:
        return _module("pyarrow.parquet").ParquetFile(path)
    except (OSError, _module("pyarrow").ArrowException) as error:
        raise ValueError(f"{path} can't be read as Parquet: {str(error).splitlines()[0]}") from error


def _parquet_shards(root: Path, files: list[Path], field: Field) -> list[Shard]:
    """One shard for each row group: the unit that Parquet can read on its own."""
    found = []
    for file in files:
        with _parquet_file(file) as opened:
            strings = [f.name for f in opened.schema_arrow if str(f.type) in ("string", "large_string", "string_view")]
            for name in _names(field):
                if name not in strings:
                    raise ValueError(_missing(str(file), name, strings))
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                found.append(_file_shard("parquet", root, [file], field, start=group, stop=group + 1, size=rows))
    return found


def _read_parquet(shard: Shard) -> Iterator[Document]:
    (path,), (key,) = shard.paths, shard.keys
    with _parquet_file(path) as opened:
        names = list(_names(shard.field))
        table = opened.read_row_group(shard.start, columns=names)
        for row, texts in enumerate(zip(*(table.column(name) for name in names), strict=True)):
            yield Document(f"{key}@{shard.start}.{row}", *(text.as_py() or "" for text in texts))


# ---------------------------------------------------------------------------------------------------------------- TFDS


def _tfds_builder(name: str) -> Any:
    """A builder whose data is on disk in array_record form, the one that is read without TensorFlow."""
    tfds = _module("tensorflow_datasets")
    _module("array_record")
    path = Path(name).expanduser()
    if path.is_absolute() or path.is_dir():
        try:
            return tfds.builder_from_directory(str(path))
        except Exception as error:
            raise ValueError(
                f"data source tfds:{name}: no prepared data set in that folder: {_first_line(error)}"
            ) from error
    try:
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()  # does nothing when the data is there
    except Exception as error:  # tfds raises dozens of kinds: no such name, no network, no space, a format mismatch
        raise ValueError(f"data source tfds:{name} can't be prepared: {_first_line(error)}") from error
    return builder


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _tfds_rows(name: str, split: str) -> Any:
    builder = _tfds_builder(name)
    if split.partition("[")[0] not in builder.info.splits:
        raise ValueError(f"data source tfds:{name}: no split {split!r}; splits there: {', '.join(builder.info.splits)}")
    try:
        return builder.as_data_source(split=split)
    except Exception as error:
        remedy = "prepare it with file_format='array_record'"
        raise ValueError(f"data source tfds:{name}: {remedy} ({_first_line(error)})") from error


def _tfds_shards(source: str, field: Field) -> list[Shard]:
    name, _, split = source.removeprefix("tfds:").partition(":")
    split = split or "train"
    if not name:
        raise ValueError(
            "data source 'tfds:' names no data set: tfds:NAME/CONFIG[:split] or tfds:/prepared/folder[:split]"
        )
    builder = _tfds_builder(name)
    rows = _tfds_rows(name, split)
    if len(rows):
        _tfds_texts(rows[0], field, f"tfds:{name}")
    stamp = hashlib.sha256(
        repr((builder.info.full_name, split, len(rows), _split_bytes(builder, split))).encode()
    ).hexdigest()
    pieces = max(1, min(TFDS_SHARDS, len(rows)))
    cuts = [len(rows) * i // pieces for i in range(pieces + 1)]
    key = f"{builder.info.full_name}/{split}"
    return [
        Shard("tfds", "", (name, split), (key, ""), field, start, stop, stamp, size=stop - start)
        for start, stop in itertools.pairwise(cuts)
    ]


def _split_bytes(builder: Any, split: str) -> Any:
    info = builder.info.splits[split.partition("[")[0]]
    return info.num_bytes, list(info.shard_lengths or ()), [Path(f).stat().st_mtime_ns for f in info.filepaths]


def _tfds_texts(row: dict[str, Any], field: Field, where: str) -> list[str]:
    values = [row.get(name) for name in _names(field)]
    for name, value in zip(_names(field), values, strict=True):
        if not isinstance(value, bytes | str):
            there = [name for name, value in row.items() if isinstance(value, bytes | str)]
            raise ValueError(_missing(where, name, there))
    return [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values]


def _read_tfds(shard: Shard) -> Iterator[Document]:
    name, split = shard.paths
    rows = _tfds_rows(name, split)
    for row in range(shard.start, shard.stop):
        yield Document(f"{shard.keys[0]}@{row}", *_tfds_texts(rows[row], shard.field, f"tfds:{name} row {row}"))


SUFFIX_KINDS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".parquet": "parquet"}
CUTTERS = {"text": _text_shards, "jsonl": _jsonl_shards, "parquet": _parquet_shards}
READERS: dict[str, Callable[[Shard], Iterator[Document]]] = {
    "text": _read_text,
    "parallel": _read_parallel,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "tfds": _read_tfds,
}
