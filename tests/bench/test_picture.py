"""The picture: well-formed, escaped, one cell a family and contender."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from finitune.bench.picture import FATES, fate, svg

_SVG = "{http://www.w3.org/2000/svg}"


def record(**changes: Any) -> dict[str, Any]:
    base = {"kind": "faults", "name": "a", "fault_class": "A", "contender": "finitune", "seed": 0, "detected": True}
    rest = {"poisoned_steps": 0, "curable": True, "final_loss": 1.0, "cured": True, "error": "", "remedy": True}
    return base | rest | changes


def test_fates() -> None:
    assert fate(record()) == "cured"
    assert fate(record(cured=False)) == "went on"
    assert fate(record(cured=False, detected=False)) == "unnoticed"
    assert fate(record(cured=False, error="Halted: x")) == "stopped"
    assert fate(record(poisoned_steps=1)) == "poisoned"
    assert fate(record(cured=False, final_loss=None)) == "poisoned"
    assert fate(record(curable=False, cured=None, final_loss=None, error="Halted: x")) == "stopped"
    assert fate(record(curable=False, cured=None)) == "cured"
    assert fate(record(curable=False, cured=None, remedy=None)) == "cured"
    assert fate(record(curable=False, cured=None, remedy=False)) == "went on", "every step refused is no cure"


def test_the_picture_is_well_formed_and_complete() -> None:
    records = [record(), record(seed=1, cured=False), record(contender="plain", poisoned_steps=2), record(name="b")]
    root = ElementTree.fromstring(svg(records))
    titles = [t.text for t in root.iter(f"{_SVG}title")]
    assert titles.count("1 cured, 1 went on") == 2
    assert titles.count("1 poisoned") == 1
    texts = [t.text for t in root.iter(f"{_SVG}text")]
    assert {"finitune", "plain", "A  a", "A  b"} <= set(texts)
    assert len([t for t in texts if t in {says for _, says in FATES.values()}]) == len(FATES)


def test_names_are_escaped() -> None:
    hostile = "<script>alert('x')</script>"
    picture = svg([record(name=hostile, contender=hostile)])
    assert "<script>" not in picture
    ElementTree.fromstring(picture)


def test_nothing_gives_an_empty_picture() -> None:
    ElementTree.fromstring(svg([]))


def test_ours_is_the_first_column() -> None:
    picture = svg([record(contender="another"), record()])
    assert picture.index(">finitune<") < picture.index(">another<")
