"""The built-in source: thousands of rows from the interpreter's own documentation, without importing anything."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from finitune.core.types import Finding
from finitune.data.formats import docstrings
from finitune.data.records import Example, Row
from finitune.data.stdlib import rows


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return list(rows("finitune:stdlib"))


def test_there_are_thousands_in_a_fixed_order_made_in_seconds(found: list[Row]) -> None:
    assert len(found) > 2000
    start_s = time.process_time()
    assert [r.id for r in rows("finitune:stdlib")] == [r.id for r in found]
    assert time.process_time() - start_s < 8, "about 1.4 s on a quiet machine"
    assert [r.id.row for r in found] == list(range(1, len(found) + 1))


def test_well_known_objects_are_there_and_tests_are_not(found: list[Row]) -> None:
    objects = {r.fields["object"] for r in found}
    assert {"collections.Counter.most_common", "json.dumps", "math.hypot", "itertools.chain", "dict.get"} <= objects
    assert not any(o.startswith(("test.", "idlelib.", "this", "antigravity")) for o in objects)


def test_all_make_conversations(found: list[Row]) -> None:
    made = [docstrings.to_messages(r) for r in found]
    assert not [m for m in made if isinstance(m, Finding)]
    questions = {m.messages[0].content.split("`")[0] for m in made if isinstance(m, Example)}
    assert len(questions) >= 8, "several phrasings"


def test_nothing_is_imported_to_make_them() -> None:
    """Modules such as ``this`` and ``antigravity`` act when imported."""
    code = (
        "import sys; from finitune.data.stdlib import rows; before = set(sys.modules); n = len(list(rows('s')));"
        "new = {m for m in set(sys.modules) - before if not m.startswith('_sysconfigdata')};"
        "assert n > 2000; assert not new, new; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
