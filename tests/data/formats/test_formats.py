"""One sweep over all data formats: total, documented, and each row understood by its own format."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.codes import all_codes
from finitune.core.errors import describe
from finitune.core.registry import load, names
from finitune.core.types import Finding, RowId
from finitune.data.records import ROLES, Example, Row

ROW = RowId("rows.jsonl", 3, "00000000000f")
FORMATS = names("formats")
SECTIONS = ("What it sees:", "Why it is bad:", "Example:", "What to do:", "Source:")

GOOD: Mapping[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add", "input": "1 and 2", "output": "3"},
    "docstrings": {"object": "math.pi", "kind": "function", "docstring": "The number pi."},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "prompt_completion": {"question": "1 + 2?", "answer": "3"},
    "text": {"text": "Call me Ishmael."},
}
# Field names of all formats, so that random rows get past the door of each reader.
_KEYS = st.sampled_from(
    "instruction input output instances history system tools messages conversations dialogs role content from value "
    "prompt completion chosen question answer text object docstring kind images weight train tool_calls function "
    "name arguments reasoning_content type".split()
)
_TEXTS = st.one_of(
    st.text(max_size=6), st.sampled_from(["user", "assistant", "gpt", "function_call", "[]", "{}", "\ud83d"])
)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXTS)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, max_size=4)),
    max_leaves=12,
)


def test_each_format_has_its_row_here() -> None:
    assert set(GOOD) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_documentation_has_all_sections(name: str) -> None:
    doc = load("formats", name).__doc__ or ""
    assert [s for s in SECTIONS if f"\n{s}\n" not in doc] == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_good_row_is_recognised_best_by_its_own_format(name: str) -> None:
    scores = {other: load("formats", other).sniff(GOOD[name]) for other in FORMATS}
    assert max(scores, key=lambda n: scores[n]) == name
    assert all(0.0 <= s <= 1.0 for s in scores.values())


@pytest.mark.parametrize("name", FORMATS)
def test_a_good_row_becomes_an_example_with_its_id(name: str) -> None:
    example = load("formats", name).to_messages(Row(ROW, GOOD[name]))
    assert isinstance(example, Example)
    assert example.id == ROW
    assert (example.text is None) == bool(example.messages)
    assert all(m.role in ROLES for m in example.messages)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=150)
@given(fields=st.dictionaries(_KEYS, _VALUES, max_size=6))
def test_no_row_ever_raises(name: str, fields: dict[str, Any]) -> None:
    member = load("formats", name)
    assert 0.0 <= member.sniff(fields) <= 1.0
    result = member.to_messages(Row(ROW, fields))
    assert isinstance(result, (Example, Finding))
    if isinstance(result, Finding):
        assert result.rows == (ROW,)
        assert result.where.startswith("rows.jsonl:3")
        message = describe(all_codes()[result.code], result.where, result.data)
        assert "{" not in message.replace("{{", "").splitlines()[0] or "{" in str(dict(result.data))


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_good_row_with_one_field_spoilt_never_raises(name: str, data: st.DataObject) -> None:
    fields = dict(GOOD[name])
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(_VALUES)
    assert isinstance(load("formats", name).to_messages(Row(ROW, fields)), (Example, Finding))


def test_formats_and_codes_load_nothing_heavy() -> None:
    code = (
        "import sys; from finitune.core.registry import load, names; import finitune.data.codes;"
        "[load('formats', n) for n in names('formats')];"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
