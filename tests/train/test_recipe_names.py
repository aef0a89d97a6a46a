"""The table of foreign names points at fields that exist."""

from __future__ import annotations

import pytest

from finitune.core.messages.catalogue import set_language, text
from finitune.train.recipe_fields import fields
from finitune.train.recipe_names import REFUSED, RENAMED


@pytest.mark.parametrize("foreign", sorted(RENAMED))
def test_a_foreign_name_leads_to_a_field_and_is_none_itself(foreign):
    assert RENAMED[foreign] in fields()
    assert foreign not in fields()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_refusal_has_its_reason_in_both_languages(language):
    set_language(language)
    try:
        assert all(text(f"recipe.refused.{word}") for word in REFUSED.values())
    finally:
        set_language(None)


def test_a_name_is_renamed_or_refused_not_both():
    assert not set(RENAMED) & set(REFUSED)
