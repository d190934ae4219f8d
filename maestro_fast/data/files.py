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
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_LINES, ".json", *_TABLES, ".parquet")
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
    file = Path(path)
    kind = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if file.is_dir():
        rows = _filled(_read_folder(file, split, field), structured)
    elif kind == ".parquet":
        rows = _filled(_read_parquet(_existing(file, field), field), structured)
    elif kind in _SUFFIXES:
        rows = _read_text_file(_existing(file, field), kind, field)
    elif file.is_file():
        ending = repr(file.suffix) if file.suffix else "nothing"
        raise ValueError(f"{field}.path: {path} ends in {ending}, expected one of {', '.join(_SUFFIXES)}")
    elif file.is_absolute() or path.startswith(".") or path.count("/") > 1:  # The hub has no such names.
        raise FileNotFoundError(f"{field}.path: no file or folder {path}")
    else:
        rows = _filled(_read_hub(path, split, field), structured)
    return rows


def drop_filled_fields(value: Any) -> Any:
    """``value`` without the fields of mappings that are None, at any depth."""
    if isinstance(value, dict):
        return {name: drop_filled_fields(item) for name, item in value.items() if item is not None}
    return [drop_filled_fields(item) for item in value] if isinstance(value, list) else value


def _filled(rows: list[Row], structured: Sequence[str]) -> list[Row]:
    names = [name for name in structured if rows and name in rows[0]]
    return [row | {name: drop_filled_fields(row[name]) for name in names} for row in rows] if names else rows


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
        return _table(text, _TABLES[kind], path, field)
    return _json_lines(text, path, field) if kind in _LINES else _json(text, path, field)


def _json_lines(text: str, path: Path, field: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{field}.path: {path}, line {number} is not JSON: {error}") from error
            rows.append(_object(row, f"{path}, line {number}", field))
    return rows


def _json(text: str, path: Path, field: str) -> list[Row]:
    """The rows of a .json file. Many such files hold one object per line in fact."""
    try:
        value = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{"):
            return _json_lines(text, path, field)
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


def _table(text: str, delimiter: str, path: Path, field: str) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # A prompt may be longer than the 128 KiB that the module allows by itself.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{field}.path: {path} has a column name twice, columns are {', '.join(names)}")
        rows = []
        for values in lines:
            if values and len(values) != len(names):
                raise ValueError(
                    f"{field}.path: {path}, line {lines.line_num} has {len(values)} values, expected {len(names)}, one "
                    f"for each of {', '.join(names)}"
                )
            rows += [dict(zip(names, values, strict=True))] if values else []
    except csv.Error as error:
        raise ValueError(f"{field}.path: {path}, line {lines.line_num} is not CSV: {error}") from error
    return rows


def _read_parquet(path: Path, field: str) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f'{field}.path: Parquet needs pyarrow, pip install "maestro-fast[data]"') from error
    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{field}.path: {path} is not a Parquet file: {_sentence(error)}") from error
    return rows


def _read_folder(path: Path, split: str, field: str) -> list[Row]:
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{field}.path: {path} is a folder, which {_NEEDS_DATASETS}") from error
    if not saved:
        return _loaded(lambda: datasets.load_dataset(str(path), split=split), str(path), field)

    def load() -> Any:
        found = datasets.load_from_disk(str(path))
        if not isinstance(found, datasets.DatasetDict):
            return found
        if split not in found:
            raise ValueError(f"there is no split {split!r}, expected {field}.split to be one of {', '.join(found)}")
        return found[split]

    return _loaded(load, str(path), field)


def _read_hub(name: str, split: str, field: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{field}.path: {name} is neither a file nor a folder here; a data set of the hub {_NEEDS_DATASETS}"
        ) from error
    return _loaded(
        lambda: datasets.load_dataset(name, split=split), name, field, "neither a file nor a folder here, and "
    )


def _loaded(load: Callable[[], Any], name: str, field: str, not_here: str = "") -> list[Row]:
    """The rows of what ``load`` returns; whatever datasets raises becomes a ValueError."""
    try:
        return [dict(row) for row in load()]
    except Exception as error:  # datasets raises errors of the hub, of the network, of Arrow and of its own.
        raise ValueError(
            f"{field}.path: {name} is {not_here}nothing that datasets loads: {_sentence(error)}"
        ) from error


def _sentence(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
