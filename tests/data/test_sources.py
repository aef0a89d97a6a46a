"""Every row, good or bad, is named; one bad line never costs the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError
from finitune.core.types import Finding, RowId
from finitune.data.records import Row, canonical_bytes
from finitune.data.rowcodes import BROKEN_JSON_LINE, INVALID_UTF8, NOT_AN_OBJECT
from finitune.data.sources import read_rows


def read(path: str, unit: str = "line") -> list[Row | Finding]:
    return list(read_rows(path, unit))


def fields(path: str, unit: str = "line") -> list[Any]:
    return [r.fields if isinstance(r, Row) else r.code for r in read(path, unit)]


def error(path: str) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path)
    return caught.value


def test_json_lines_are_rows_numbered_by_line(write: Callable[..., str]) -> None:
    path = write("a.jsonl", '{"a": 1}\n\n{"a": 2}\n   \n{"a": 3}')
    rows = read(path)
    assert [(r.id.row, r.fields) for r in rows if isinstance(r, Row)] == [(1, {"a": 1}), (3, {"a": 2}), (5, {"a": 3})]


def test_a_row_is_named_by_its_content_not_by_its_layout(write: Callable[..., str]) -> None:
    rows = read(write("a.jsonl", '{"a": 1, "b": "\\u00e9"}\n{ "b":"é","a":1 }\n{"a": 2, "b": "é"}\n'))
    digests = [r.id.digest for r in rows if isinstance(r, Row)]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0] == RowId.of("", 0, canonical_bytes({"a": 1, "b": "é"})).digest


def test_the_same_row_has_the_same_digest_in_every_kind_of_file(write: Callable[..., str]) -> None:
    rows = [{"a": "x"}]
    (one,), (two,) = read(write("a.jsonl", rows)), read(write("a.json", rows))
    assert isinstance(one, Row)
    assert isinstance(two, Row)
    assert one.id.digest == two.id.digest


def test_broken_lines_are_findings_with_line_and_column_and_the_rest_goes_on(write: Callable[..., str]) -> None:
    path = write("a.jsonl", '{"a": 1}\n{"a": oops}\n[1, 2]\n"text"\n{"a": 4}\n{"a": ')
    rows = read(path)
    assert [r.code if isinstance(r, Finding) else r.fields["a"] for r in rows] == [
        1,
        BROKEN_JSON_LINE.code,
        NOT_AN_OBJECT.code,
        NOT_AN_OBJECT.code,
        4,
        BROKEN_JSON_LINE.code,
    ]
    broken = rows[1]
    assert isinstance(broken, Finding)
    assert (broken.data["row"], broken.data["column"]) == (2, 7)
    assert broken.where == f"{path}:2"
    assert broken.rows[0].row == 2


def test_invalid_utf8_is_a_finding_with_the_byte_and_its_place(write: Callable[..., str]) -> None:
    path = write("a.jsonl", b'{"a": "ok"}\n{"a": "caf\xe9"}\n{"a": "ok"}\n')
    good, bad, after = read(path)
    assert isinstance(bad, Finding)
    assert (bad.code, bad.data["byte"], bad.data["column"]) == (INVALID_UTF8.code, "0xe9", 11)
    assert isinstance(good, Row)
    assert isinstance(after, Row)


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000, '{"a": ' * 50_000])
def test_absurd_json_is_a_finding(write: Callable[..., str], line: str) -> None:
    codes = fields(write("a.jsonl", f'{{"a": 1}}\n{line}\n{{"a": 3}}\n'))
    assert codes[0] == {"a": 1}
    assert codes[1] in (BROKEN_JSON_LINE.code, NOT_AN_OBJECT.code)
    assert codes[2] == {"a": 3}


def test_a_byte_order_mark_is_not_content(write: Callable[..., str]) -> None:
    assert fields(write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')) == [{"a": 1}, {"a": 2}]
    assert fields(write("a.json", b'\xef\xbb\xbf[{"a": 1}]')) == [{"a": 1}]


def test_a_list_of_messages_is_a_row(write: Callable[..., str]) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    assert fields(write("a.jsonl", [turns])) == [{"messages": turns}]


@pytest.mark.parametrize(
    "content",
    [[{"a": 1}, {"a": 2}], {"data": [{"a": 1}, {"a": 2}]}, {"version": 1, "rows": [{"a": 1}, {"a": 2}]}],
)
def test_json_files_hold_a_list_or_an_object_with_one(write: Callable[..., str], content: Any) -> None:
    assert fields(write("a.json", content)) == [{"a": 1}, {"a": 2}]


def test_a_single_row_object_is_one_row(write: Callable[..., str]) -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert fields(write("a.json", row)) == [row]
    assert fields(write("b.json", {"instruction": "x", "output": "y"})) == [{"instruction": "x", "output": "y"}]


def test_json_lines_under_the_wrong_name_are_read(write: Callable[..., str]) -> None:
    assert fields(write("a.json", '{"a": 1}\n{"a": \n{"a": 3}\n')) == [{"a": 1}, BROKEN_JSON_LINE.code, {"a": 3}]


def test_a_broken_json_file_is_an_error_with_line_and_column(write: Callable[..., str]) -> None:
    found = error(write("a.json", '[\n  {"a": 1},\n  {"a": oops}\n]'))
    assert (found.code.code, found.data["line"], found.data["column"]) == ("DAT005", 3, 9)
    assert ".jsonl" in str(found)


def test_a_json_file_in_another_encoding_is_an_error_with_its_place(write: Callable[..., str]) -> None:
    found = error(write("a.json", b'[\n  {"a": "caf\xe9"}\n]'))
    assert (found.code.code, found.data["line"], found.data["column"]) == ("DAT005", 2, 13)


@pytest.mark.parametrize(("content", "code"), [("[]", "DAT003"), ("{}", "DAT003"), ("  \n", "DAT003"), ("3", "DAT016")])
def test_json_files_without_rows(write: Callable[..., str], content: str, code: str) -> None:
    assert error(write("a.json", content)).code.code == code


def test_an_object_of_objects_is_no_list_of_rows(write: Callable[..., str]) -> None:
    found = error(write("a.json", {"first": {"file_name": "a"}, "second": {"file_name": "b"}}))
    assert (found.code.code, "first, second" in found.data["found"]) == ("DAT016", True)


def test_text_files_are_documents_by_line_or_whole(write: Callable[..., str]) -> None:
    path = write("a.txt", "One.\n\nTwo. \n")
    assert fields(path) == [{"text": "One."}, {"text": "Two. "}]
    assert fields(path, "file") == [{"text": "One.\n\nTwo. \n"}]


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), path)
    assert fields(path) == [{"prompt": "a", "completion": "c"}, {"prompt": "b", "completion": None}]


def test_a_broken_parquet_file_is_an_error(write: Callable[..., str]) -> None:
    pytest.importorskip("pyarrow")
    assert error(write("a.parquet", b"PAR1 and then nothing of the kind")).code.code == "DAT009"


def test_parquet_without_pyarrow_says_what_to_install(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"(?s)DAT008.*finitune\[parquet\]"):
        read(write("a.parquet", b"PAR1rest"))


def test_a_faulty_file_is_refused_when_asked_for_not_when_read(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_rows(tmp_path / "missing.jsonl")


def test_infinite_and_missing_numbers_have_a_stable_name(write: Callable[..., str]) -> None:
    rows = read(write("a.jsonl", '{"a": NaN}\n{"a": NaN}\n{"a": Infinity}\n{"a": -0.0}\n{"a": 5e-324}\n'))
    digests = [r.id.digest for r in rows if isinstance(r, Row)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_half_characters_do_not_break_the_name_of_a_row(write: Callable[..., str]) -> None:
    (row,) = read(write("a.jsonl", '{"a": "\\ud83d"}'))
    assert isinstance(row, Row)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.one_of(st.binary(max_size=30), st.text(max_size=20).map(lambda t: json.dumps(t).encode()))))
def test_any_bytes_are_rows_or_findings(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"\n".join(line.replace(b"\0", b"") for line in lines))
    found = read(str(path))
    assert isinstance(found[0], Row)
    assert all(isinstance(r, (Row, Finding)) for r in found)
    numbers = [r.id.row if isinstance(r, Row) else r.rows[0].row for r in found]
    assert numbers == sorted(set(numbers))
