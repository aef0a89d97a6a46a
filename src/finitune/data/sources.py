"""Rows from files, one at a time: each good one a ``Row``, each bad line a ``Finding``, the rest goes on.

* ``.jsonl``, ``.ndjson``: one JSON object a line; the row number is the line number.
* ``.json``: a list of rows, an object with one list of rows, one row object, or (found in the wild)
  JSON lines under the wrong name.
* ``.parquet``: needs pyarrow.
* ``.txt``: one document a line, or (``unit="file"``) the whole file.

A list of messages in place of an object is taken as ``{"messages": [...]}``.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finitune.core.errors import UserError
from finitune.core.types import Finding, RowId
from finitune.data import stdlib
from finitune.data.codes import BROKEN_JSON_FILE, EMPTY_FILE, NO_PYARROW, NO_ROW_LIST, UNREADABLE
from finitune.data.files import STDLIB, check_file, file_digest
from finitune.data.records import Row, canonical_bytes, row_finding, type_name
from finitune.data.rowcodes import BROKEN_JSON_LINE, INVALID_UTF8, NOT_AN_OBJECT

__all__ = ["file_digest", "read_rows"]

_ROW_KEYS = ("data", "rows", "train", "examples", "instances", "conversations", "items", "records")
_PARQUET_BATCH_ROWS = 1024


def read_rows(path: str | Path, unit: str = "line") -> Iterator[Row | Finding]:
    """Rows of one file in file order; every row and every bad line is named by a RowId.

    Raises:
        UserError: the file as a whole cannot be read (missing, folder, empty, binary, broken .json, ...).
    """
    name = str(path)
    if name == STDLIB:
        return iter(stdlib.rows(STDLIB))
    fault = check_file(name)
    if fault is not None:
        raise fault
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(name)
    if suffix == ".txt":
        return _text_rows(name, unit)
    return _json_rows(name) if suffix == ".json" else _line_rows(name)


def _lines(name: str) -> Iterator[tuple[RowId, bytes]]:
    """Lines that are not blank, numbered from 1, without a byte-order mark."""
    with Path(name).open("rb") as stream:
        for number, line in enumerate(stream, 1):
            raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if raw.strip():
                yield RowId.of(name, number, raw.strip()), raw.rstrip(b"\r\n")


def _decode(row: RowId, raw: bytes) -> str | Finding:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x}"
        return row_finding(INVALID_UTF8, row, byte=byte, column=error.start + 1)


def _line_rows(name: str) -> Iterator[Row | Finding]:
    for row, raw in _lines(name):
        line = _decode(row, raw)
        yield line if isinstance(line, Finding) else _line_row(row, line)


def _line_row(row: RowId, line: str) -> Row | Finding:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return row_finding(BROKEN_JSON_LINE, row, column=error.colno, reason=error.msg)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        return row_finding(BROKEN_JSON_LINE, row, column=1, reason=_first_line(error))
    return _row(row.source, row.row, value)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _row(name: str, number: int, value: Any) -> Row | Finding:
    try:
        content = canonical_bytes(value)
    except (ValueError, RecursionError, TypeError) as error:
        row = RowId.of(name, number, b"")
        return row_finding(NOT_AN_OBJECT, row, found=_first_line(error))
    row = RowId.of(name, number, content)
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return Row(row, {"messages": value})
    if not isinstance(value, dict):
        return row_finding(NOT_AN_OBJECT, row, found=type_name(value))
    return Row(row, value)


def _json_rows(name: str) -> Iterator[Row | Finding]:
    raw = Path(name).read_bytes().removeprefix(codecs.BOM_UTF8)
    if not raw.strip():
        raise UserError(EMPTY_FILE, name, path=name, size_bytes=len(raw))
    try:
        value = json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        if _is_json_lines(raw):
            return _line_rows(name)
        where = {"line": error.lineno, "column": error.colno, "reason": error.msg}
        raise UserError(BROKEN_JSON_FILE, f"{name}:{error.lineno}:{error.colno}", path=name, **where) from None
    except UnicodeDecodeError as error:
        raise _not_utf8(name, raw, error.start) from None
    except (ValueError, RecursionError) as error:
        reason = _first_line(error)
        raise UserError(BROKEN_JSON_FILE, name, path=name, line=1, column=1, reason=reason) from None
    return (_row(name, number, row) for number, row in enumerate(_row_list(name, value), 1))


def _not_utf8(name: str, raw: bytes, at: int) -> UserError:
    line = raw.count(b"\n", 0, at) + 1
    column = at - raw.rfind(b"\n", 0, at)
    reason = f"byte 0x{raw[at]:02x} is not UTF-8"
    return UserError(BROKEN_JSON_FILE, f"{name}:{line}:{column}", path=name, line=line, column=column, reason=reason)


def _is_json_lines(raw: bytes) -> bool:
    """Whether the first line is a complete object and there are more lines."""
    first, _, rest = raw.lstrip().partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), (dict, list))
    except (ValueError, RecursionError):
        return False


def _row_list(name: str, value: Any) -> list[Any]:
    """The rows of a parsed .json file."""
    if isinstance(value, list) and value:
        return value
    if isinstance(value, dict):
        lists = [k for k in _ROW_KEYS if _is_row_list(value.get(k))]
        if len(lists) == 1 and not _is_conversation(value[lists[0]]):
            return list(value[lists[0]])
        if value and not all(isinstance(v, dict) for v in value.values()):
            return [value]
    if value in ([], {}):
        raise UserError(EMPTY_FILE, name, path=name, size_bytes=Path(name).stat().st_size)
    found = type_name(value) + (f" ({', '.join(list(value)[:5])})" if isinstance(value, dict) else "")
    raise UserError(NO_ROW_LIST, name, path=name, found=found, keys=", ".join(_ROW_KEYS))


def _is_row_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, (dict, list)) for v in value)


def _is_conversation(rows: list[Any]) -> bool:
    """Turns of one conversation, rather than rows."""
    return all(isinstance(r, dict) and ("role" in r or "from" in r) for r in rows)


def _text_rows(name: str, unit: str) -> Iterator[Row | Finding]:
    lines: Iterable[tuple[RowId, bytes]] = _lines(name)
    if unit == "file":
        raw = Path(name).read_bytes().removeprefix(codecs.BOM_UTF8)
        lines = [(RowId.of(name, 1, raw), raw)]
    for row, raw in lines:
        line = _decode(row, raw)
        yield line if isinstance(line, Finding) else Row(row, {"text": line})


def _parquet_rows(name: str) -> Iterator[Row | Finding]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(NO_PYARROW, name, path=name) from None
    try:
        table = pyarrow.parquet.ParquetFile(name)
        if table.metadata.num_rows == 0:
            raise UserError(EMPTY_FILE, name, path=name, size_bytes=Path(name).stat().st_size)
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            for value in batch.to_pylist():
                number += 1
                yield _row(name, number, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(UNREADABLE, name, path=name, reason=_first_line(error)) from None
