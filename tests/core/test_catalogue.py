"""Texts: the same keys and fields in English and Chinese, for every area there is."""

from __future__ import annotations

import importlib
import re
import string
from pathlib import Path

import pytest

from finitune.core.messages import catalogue
from finitune.core.messages.catalogue import LANGUAGES, language, set_language, text

HOME = Path(catalogue.__file__).parent
AREAS = {lang: sorted(p.stem for p in (HOME / lang).glob("[a-z]*.py")) for lang in LANGUAGES}
HAN = re.compile("[\u4e00-\u9fff]")


def texts(lang: str, area: str) -> dict[str, str]:
    return importlib.import_module(f"finitune.core.messages.{lang}.{area}").TEXTS


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


@pytest.fixture(autouse=True)
def _forget_language():
    yield
    set_language(None)


def test_every_area_exists_in_every_language() -> None:
    assert AREAS["en"] == AREAS["zh"]
    assert {"error", "precision"} <= set(AREAS["en"])


@pytest.mark.parametrize("area", AREAS["en"])
def test_both_languages_have_the_same_keys_and_fields(area: str) -> None:
    english, chinese = texts("en", area), texts("zh", area)
    assert english.keys() == chinese.keys()
    assert {k: fields(t) for k, t in english.items()} == {k: fields(t) for k, t in chinese.items()}


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("area", AREAS["en"])
def test_keys_begin_with_their_area_and_texts_are_not_empty(lang: str, area: str) -> None:
    for key, template in texts(lang, area).items():
        assert key.partition(".")[0] == area
        assert template.strip()
        assert "key" not in fields(template), "text() cannot take a field of the name of its own parameter"


@pytest.mark.parametrize("area", AREAS["en"])
def test_english_holds_no_chinese(area: str) -> None:
    assert not [k for k, t in texts("en", area).items() if HAN.search(t)]


@pytest.mark.parametrize("area", AREAS["zh"])
def test_chinese_is_translated(area: str) -> None:
    """A text of words without one Chinese character was forgotten; one of names and signs alone was not."""
    forgotten = [
        key
        for key, template in texts("zh", area).items()
        if not HAN.search(template)
        and template == texts("en", area)[key]
        and len(re.findall(r"[a-z]{3,}", re.sub(r"\{\w+\}|`[^`]*`", "", template))) > 2
    ]
    assert not forgotten


def test_every_key_in_the_source_exists() -> None:
    """A key that is written out as a literal, in any file."""
    used = {
        key
        for path in HOME.parents[1].rglob("*.py")
        for key in re.findall(r'\btext\(\s*"([a-z_]+\.[a-z0-9_.]+)"', path.read_text(encoding="utf-8"))
    }
    known = {key for area in AREAS["en"] for key in texts("en", area)}
    assert used
    assert used <= known, used - known


def test_a_text_is_filled() -> None:
    set_language("en")
    assert text("precision.requested", name="fp32") == "fp32: asked for"
    set_language("zh")
    assert text("precision.requested", name="fp32") == "fp32：按要求"


def test_an_unknown_key_is_a_bug() -> None:
    with pytest.raises(KeyError):
        text("error.no_such_key")
    with pytest.raises(ModuleNotFoundError):
        text("no_such_area.key")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "FINITUNE_LANG": "zh"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "", "LC_ALL": "zh_TW"}, "zh"),
        ({"LANG": "C"}, "en"),
    ],
)
def test_the_environment_chooses(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FINITUNE_LANG", "LC_ALL", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_a_choice_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINITUNE_LANG", "zh")
    set_language("en")
    assert language() == "en"
    set_language(None)
    assert language() == "zh"
    set_language("ZH-cn")
    assert language() == "zh"
