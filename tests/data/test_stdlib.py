"""The built-in source: thousands of rows from the interpreter's own documentation, without importing anything."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from finitune.core.types import Finding
from finitune.data.formats import docstrings
from finitune.data.records import Example, Row
from finitune.data.stdlib import rows


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return list(rows("finitune:stdlib"))


def test_there_are_thousands(found: list[Row]) -> None:
    assert len(found) > 2000
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


def test_the_same_rows_come_in_seconds_in_another_process_and_nothing_is_imported(found: list[Row]) -> None:
    """Modules such as ``this`` and ``antigravity`` act when imported."""
    code = (
        "import hashlib, sys, time; from finitune.data.stdlib import rows; before = set(sys.modules);"
        "start_s = time.process_time(); made = list(rows('finitune:stdlib')); used_s = time.process_time() - start_s;"
        "new = {m for m in set(sys.modules) - before if not m.startswith('_sysconfigdata')};"
        "assert not new, new; assert 'torch' not in sys.modules; assert used_s < 8, used_s;"
        "print(hashlib.sha256(''.join(str(r.id) for r in made).encode()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256("".join(str(r.id) for r in found).encode()).hexdigest()
