"""Every field is described, and the description is enough to write one."""

from __future__ import annotations

import pytest

from finitune.train.recipe import Recipe
from finitune.train.recipe_fields import describe_fields, fields
from finitune.train.recipe_words import expected, shown


@pytest.fixture(autouse=True)
def _english(monkeypatch):
    monkeypatch.setenv("FINITUNE_LANG", "en")


def test_every_field_has_a_description_a_type_and_a_default():
    for doc in describe_fields():
        assert doc.description.endswith("."), doc.path
        assert doc.type, doc.path
        value = Recipe()
        for part in doc.path.split("."):
            value = getattr(value, part)
        assert doc.default == value, doc.path


def test_sections_are_known_but_not_described_as_fields():
    assert fields()["lora"].is_section
    assert "lora" not in {d.path for d in describe_fields()}
    assert {"lora.r", "data.max_length", "guard.detectors"} <= {d.path for d in describe_fields()}


TYPES = {
    "learning_rate": "a finite number > 0 and <= 10",
    "warmup_steps": "a whole number >= 0 and <= 1000000000 or null",
    "seed": "a whole number >= 0 and <= 9223372036854775807",
    "lora.target_modules": "auto or all-linear or a list of items (each a text)",
    "fp16": "true or false or null",
    "guard.detectors": "a section of keys",
}


@pytest.mark.parametrize(("path", "words"), TYPES.items())
def test_types_are_told_in_words(path, words):
    assert fields()[path].type == words


def test_a_value_is_shown_on_one_bounded_line():
    deep: object = "x" * 1000
    for _ in range(50):
        deep = [deep, deep]
    for value in (deep, "y" * 1000, 10**400, {"a": deep}):
        assert len(shown(value)) < 400
    assert (shown(None), shown(True), shown("no"), shown(1e-4)) == ("null", "true", '"no"', "0.0001")


def test_an_open_mapping_is_a_section():
    assert expected({"additionalProperties": {}}) == "a section of keys"
