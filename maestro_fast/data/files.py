"""Reads the rows of a data set from a file, a folder or ``datasets.load_dataset``.

    .jsonl, .ndjson          one JSON object per line
    .json                    an array of JSON objects, or one object per line
    .csv, .tsv               a line of column names, and then rows, all of whose values are text
    .parquet                 needs pyarrow
    .gz behind one of these  is decompressed, except for Parquet, which is compressed in itself
    a folder                 of ``Dataset.save_to_disk``, or with files for ``load_dataset``; needs datasets
    any other name           a data set of the hub, for ``load_dataset``; needs datasets

JSON, Parquet and datasets keep numbers, lists and mappings as they are. Parquet and datasets give every mapping of a
column the fields of all of them, with None where it had none; ``drop_filled_fields`` undoes that.

``read_rows`` reads all rows at once. ``open_rows`` reads them one by one, with the same result: lines and Parquet are
read from the file as they are needed, and a data set of the hub is streamed by datasets.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_LINES, ".json", *_TABLES, ".parquet")
_AT_ONCE = 1000  # the number of rows of a Parquet file that are in memory together, beside a row group
_NEEDS_DATASETS = 'needs datasets, pip install "maestro-fast[data]"'


def read_rows(path: str, split: str, *, field: str = "data", structured: Sequence[str] = ()) -> list[Row]:
    """Reads all rows.

    Args:
        path: a file, a folder, or the name of a data set, see the head of this page.
        split: the split that datasets loads; files have none.
        field: the name of the section of the config, for errors.
        structured: the columns in whose mappings a None from Parquet or datasets stands for a field that is not there.

    Returns:
        The rows, by column.

    Raises:
        ValueError: the file is broken (its line is named), of another kind, or holds no rows of columns; or datasets
            cannot load it.
        FileNotFoundError: there is no such file.
        ImportError: what reads this kind is not installed.
    """
    file, kind = Path(path), _kind(path)
    if kind in _SUFFIXES and kind != ".parquet" and not file.is_dir():
        return _read_text_file(_existing(file, field), kind, field)
    return list(_rows(path, split, field, structured, streaming=False))


def open_rows(
    path: str, split: str, *, field: str = "data", structured: Sequence[str] = ()
) -> Callable[[], Iterator[Row]]:
    """Opens a data set whose rows are read one by one.

    Args:
        path, split, field, structured: as ``read_rows`` takes them.

    Returns:
        A function that begins to read. What is wrong with a row is raised when it is read.

    Raises:
        ValueError: rows of this kind cannot be read one by one, or as ``read_rows``.
        FileNotFoundError, ImportError: as ``read_rows``.
    """
    file, kind = Path(path), _kind(path)
    if kind not in _SUFFIXES or kind == ".parquet" or file.is_dir():
        return lambda: _rows(path, split, field, structured, streaming=True)
    if kind == ".json":
        raise ValueError(
            f"{field}.streaming: true, but {path} is one JSON document, which is read as a whole, expected .jsonl"
        )
    _existing(file, field)
    if kind in _TABLES:
        return lambda: _table(_lines(file, field), _TABLES[kind], file, field)
    return lambda: _json_lines(_lines(file, field), file, field)


def _kind(path: str) -> str:
    file = Path(path)
    return file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix


def _rows(path: str, split: str, field: str, structured: Sequence[str], *, streaming: bool) -> Iterator[Row]:
    """The rows of what Arrow reads, which is everything but files of text."""
    file = Path(path)
    if file.is_dir():
        rows = _folder_rows(file, split, field, streaming=streaming)
    elif _kind(path) == ".parquet":
        rows = _parquet_rows(_existing(file, field), field)
    elif file.is_file():
        ending = repr(file.suffix) if file.suffix else "nothing"
        raise ValueError(f"{field}.path: {path} ends in {ending}, expected one of {', '.join(_SUFFIXES)}")
    elif file.is_absolute() or path.startswith(".") or path.count("/") > 1:  # The hub has no such names.
        raise FileNotFoundError(f"{field}.path: no file or folder {path}")
    else:
        rows = _hub_rows(path, split, field, streaming=streaming)
    names: list[str] | None = None
    for row in rows:
        names = [name for name in structured if name in row] if names is None else names
        yield row | {name: drop_filled_fields(row[name]) for name in names} if names else row


def drop_filled_fields(value: Any) -> Any:
    """``value`` without the fields of mappings that are None, at any depth."""
    if isinstance(value, dict):
        return {name: drop_filled_fields(item) for name, item in value.items() if item is not None}
    return [drop_filled_fields(item) for item in value] if isinstance(value, list) else value


def _existing(path: Path, field: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{field}.path: no file {path}")
    return path


def _read_text_file(path: Path, kind: str, field: str) -> list[Row]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{field}.path: {path} is not a whole gzip file: {error}") from error
    try:
        text = content.decode("utf-8-sig")  # Some editors write a byte order mark, which is no part of the text.
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{field}.path: {path}, line {line} is not UTF-8 text") from error
    if kind in _TABLES:
        return list(_table(io.StringIO(text, newline=""), _TABLES[kind], path, field))
    return list(_json_lines(text.split("\n"), path, field)) if kind in _LINES else _json(text, path, field)


def _lines(path: Path, field: str) -> Iterator[str]:
    """The lines of a file, each read when it is asked for."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{field}.path: {path}, line {number} is not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{field}.path: {path} cannot be read to its end: {error}") from error


def _json_lines(lines: Iterable[str], path: Path, field: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{field}.path: {path}, line {number} is not JSON: {error}") from error
            yield _object(row, f"{path}, line {number}", field)


def _json(text: str, path: Path, field: str) -> list[Row]:
    """The rows of a .json file. Many such files hold one object per line in fact."""
    try:
        value = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{"):
            return list(_json_lines(text.split("\n"), path, field))
        raise ValueError(f"{field}.path: {path} is not JSON: {error}") from error
    if isinstance(value, dict) and "\n" not in text.strip():
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"{field}.path: {path} holds a {type(value).__name__}, expected an array of objects")
    return [_object(row, f"{path}, entry {i} (from 0)", field) for i, row in enumerate(value)]


def _object(row: Any, where: str, field: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{field}.path: {where} holds a {type(row).__name__}, expected an object")
    return row


def _table(text: Iterable[str], delimiter: str, path: Path, field: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # A prompt may be longer than the 128 KiB that the module allows by itself.
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{field}.path: {path} has a column name twice, columns are {', '.join(names)}")
        for values in lines:
            if values and len(values) != len(names):
                raise ValueError(
                    f"{field}.path: {path}, line {lines.line_num} has {len(values)} values, expected {len(names)}, one "
                    f"for each of {', '.join(names)}"
                )
            if values:
                yield dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{field}.path: {path}, line {lines.line_num} is not CSV: {error}") from error


def _parquet_rows(path: Path, field: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f'{field}.path: Parquet needs pyarrow, pip install "maestro-fast[data]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_AT_ONCE):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{field}.path: {path} is not a Parquet file: {_sentence(error)}") from error


def _folder_rows(path: Path, split: str, field: str, *, streaming: bool = False) -> Iterator[Row]:
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{field}.path: {path} is a folder, which {_NEEDS_DATASETS}") from error

    def load() -> Any:
        if not saved:
            return datasets.load_dataset(str(path), split=split, streaming=streaming)
        found = datasets.load_from_disk(str(path))  # It stays on the disk until a row is read.
        if not isinstance(found, datasets.DatasetDict):
            return found
        if split not in found:
            raise ValueError(f"there is no split {split!r}, expected {field}.split to be one of {', '.join(found)}")
        return found[split]

    return _loaded(load, str(path), field)


def _hub_rows(name: str, split: str, field: str, *, streaming: bool = False) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{field}.path: {name} is neither a file nor a folder here; a data set of the hub {_NEEDS_DATASETS}"
        ) from error
    return _loaded(
        lambda: datasets.load_dataset(name, split=split, streaming=streaming),
        name,
        field,
        "neither a file nor a folder here, and ",
    )


def _loaded(load: Callable[[], Any], name: str, field: str, not_here: str = "") -> Iterator[Row]:
    """The rows of what ``load`` returns; whatever datasets raises becomes a ValueError."""
    try:
        for row in load():
            yield dict(row)
    except Exception as error:  # datasets raises errors of the hub, of the network, of Arrow and of its own.
        raise ValueError(
            f"{field}.path: {name} is {not_here}nothing that datasets loads: {_sentence(error)}"
        ) from error


def _sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
