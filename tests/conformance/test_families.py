"""Every member of every family loads by its file name, says what it is, and has its own test."""

from __future__ import annotations

from pathlib import Path

import pytest

from finitune.core import registry

ROOT = Path(__file__).parents[2]
MEMBERS = [(family, name) for family in registry.FAMILIES for name in registry.names(family)]


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_member_has_what_its_family_requires_and_a_docstring(family: str, name: str) -> None:
    module = registry.load(family, name)
    assert module.__doc__ is not None
    assert len(module.__doc__.split()) >= 8
    assert all(hasattr(module, required) for required in registry.FAMILIES[family].required)


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_member_is_mentioned_in_a_test_of_its_floor(family: str, name: str) -> None:
    floor = registry.FAMILIES[family].package.split(".")[1]
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "tests" / floor).rglob("*.py")]
    assert any(name in text for text in texts), f"no test under tests/{floor} names {name}"


def test_an_unknown_member_is_refused_with_close_names() -> None:
    with pytest.raises(registry.UnknownMember, match="did you mean non_finite"):
        registry.load("detectors", "non_finit")
