"""What guards and what is planted know nothing of each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "finitune"
GUARDING = ("core", "detectors", "numerics", "engine", "data", "models", "train", "adapters", "report")
# The registry lists the bench's families by name, as it lists every family.
REGISTRY = ROOT / "core" / "registry.py"


def knowing(root: Path, rooms: tuple[str, ...], except_for: Path | None = None) -> list[str]:
    """Files below these rooms that name the bench."""
    found = []
    for room in rooms:
        for path in sorted((root / room).rglob("*.py")):
            if path != except_for and re.search(r"finitune\.bench\b", path.read_text(encoding="utf-8")):
                found.append(str(path.relative_to(root)))
    return found


def test_nothing_that_guards_knows_the_bench() -> None:
    assert knowing(ROOT, GUARDING, REGISTRY) == []


def test_the_rule_sees_a_file_that_does(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "guard.py").write_text("from finitune.bench.faults import nan_row\n", encoding="utf-8")
    assert knowing(tmp_path, ("engine",)) == ["engine/guard.py"]


@pytest.mark.parametrize("room", ["faults", "controls", "runs"])
def test_what_is_planted_knows_nothing_of_what_finds_it(room: str) -> None:
    """A fault that reads the engine's limits would be tuned to them."""
    for path in sorted((ROOT / "bench" / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"finitune\.(engine|detectors|adapters|train|report)", text), path.name
