"""The steps of a journal as one parquet table, for tools that read columns.

The JSON lines stay: they are the truth, and the table holds a part of them. A row is a "step" record, a column one of
its plain fields; lists of texts (row ids, names of parameters) stay lists, findings become the list of their codes,
and what is nested deeper is left out. Numbers that are not finite are numbers again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from finitune.core.errors import UserError
from finitune.core.files import write_atomic
from finitune.core.journal import read
from finitune.train.codes_journal import NO_PARQUET

_BATCH_ROWS = 10_000
_SPELLED = ("NaN", "Infinity", "-Infinity")
_LARGEST_INT = (1 << 63) - 1
_NOT_COLUMNS = ("schema", "kind")


class _Kind(Enum):
    """What a value can be stored as; "or" of two is what holds both."""

    NOTHING = "null"
    BOOL = "bool"
    INT = "int64"
    FLOAT = "float64"
    SPELLED = "a float's name"
    TEXT = "string"
    TEXTS = "list of string"
    NESTED = "left out"

    def __or__(self, other: _Kind) -> _Kind:
        if self is other or other is _Kind.NOTHING:
            return self
        if self is _Kind.NOTHING:
            return other
        if _Kind.NESTED in (self, other):
            return _Kind.NESTED
        both = {self, other}
        if both <= {_Kind.INT, _Kind.FLOAT, _Kind.SPELLED}:
            return _Kind.FLOAT
        return _Kind.NESTED if _Kind.TEXTS in both else _Kind.TEXT


def to_parquet(journal: Path, target: Path) -> Path:
    """Write the step records of ``journal`` as the table ``target``, whole or not at all; returns ``target``.

    The table's size, compressed, is needed in memory. Damaged lines are passed over, as in all reading.

    Raises UserError SYS043 where pyarrow is not installed, OSError where the disk refuses or there is no journal.
    """
    if find_spec("pyarrow") is None:
        raise UserError(NO_PARQUET, str(target), path=str(target), package="pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    kinds: dict[str, _Kind] = {}
    num_rows = 0
    for record in _steps(journal):
        num_rows += 1
        for name, value in record.items():
            kinds[name] = kinds.get(name, _Kind.NOTHING) | _kind(value)
    kinds = {name: kind for name, kind in kinds.items() if kind is not _Kind.NESTED}
    schema = pa.schema([(name, _type(kind, pa)) for name, kind in kinds.items()])
    buffer = io.BytesIO()
    with parquet.ParquetWriter(buffer, schema) as writer:
        # A journal that is being written has grown since; the columns are those of the rows that were counted.
        rows = islice(_steps(journal), num_rows)
        while batch := list(islice(rows, _BATCH_ROWS)):
            columns = {name: [_stored(row.get(name), kind) for row in batch] for name, kind in kinds.items()}
            writer.write_table(pa.table(columns, schema))
    write_atomic(target, buffer.getvalue())
    return target


def _steps(journal: Path) -> Iterator[dict[str, Any]]:
    for record in read(journal):
        if record["kind"] == "step":
            yield {name: _flat(value) for name, value in record.items() if name not in _NOT_COLUMNS}


def _flat(value: Any) -> Any:
    """Findings as their codes; everything else as it is."""
    if isinstance(value, list) and value and all(isinstance(v, Mapping) and "code" in v for v in value):
        return [str(v["code"]) for v in value]
    return value


def _kind(value: Any) -> _Kind:
    if value is None:
        return _Kind.NOTHING
    if isinstance(value, bool):
        return _Kind.BOOL
    if isinstance(value, int):
        return _Kind.INT if abs(value) <= _LARGEST_INT else _Kind.TEXT
    if isinstance(value, float):
        return _Kind.FLOAT
    if isinstance(value, str):
        return _Kind.SPELLED if value in _SPELLED else _Kind.TEXT
    is_texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
    return _Kind.TEXTS if is_texts else _Kind.NESTED


def _type(kind: _Kind, pa: Any) -> Any:
    return {
        _Kind.NOTHING: pa.null(),
        _Kind.BOOL: pa.bool_(),
        _Kind.INT: pa.int64(),
        _Kind.FLOAT: pa.float64(),
        _Kind.SPELLED: pa.float64(),
        _Kind.TEXT: pa.string(),
        _Kind.TEXTS: pa.list_(pa.string()),
    }[kind]


def _stored(value: Any, kind: _Kind) -> Any:
    """``value`` as its column holds it."""
    if value is None or kind in (_Kind.NOTHING, _Kind.BOOL, _Kind.INT):
        return value
    if kind in (_Kind.FLOAT, _Kind.SPELLED):
        return float(value)
    if kind is _Kind.TEXTS:
        return [_unicode(v) for v in value]
    return _unicode(value if isinstance(value, str) else json.dumps(value))


def _unicode(value: str) -> str:
    """Half of a surrogate pair has no place in parquet's UTF-8; it is escaped."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")
