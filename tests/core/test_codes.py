"""Codes: unique, complete in both languages, and found without a catalogue."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.core import codes as subject
from finitune.core.codes import PREFIXES, Code, Text, all_codes, fill, page_of
from finitune.core.types import Severity

PAGE = Text("title", "what {x}", "why", ("cure",))
CODES = all_codes()
HAN = re.compile("[\u4e00-\u9fff]")


def placeholders(*templates: str) -> set[str]:
    return {name for t in templates for _, name, _, _ in string.Formatter().parse(t) if name is not None}


@pytest.mark.parametrize("name", ["NUM1", "NUM0001", "num001", "XYZ001", "NUM00a", "", "NUM-01", "NUM 01"])
def test_a_malformed_code_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        Code(name, Severity.NOTE, PAGE, PAGE)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_makes_codes(prefix: str) -> None:
    assert Code(f"{prefix}000", Severity.NOTE, PAGE, PAGE).code == f"{prefix}000"


def test_a_finding_takes_the_severity_of_its_code() -> None:
    found = Code("NUM999", Severity.ERROR, PAGE, PAGE).find("here", veto=True, x=1.5)
    assert (found.code, found.severity, found.where, found.veto) == ("NUM999", Severity.ERROR, "here", True)
    assert found.data == {"x": 1.5}


def test_the_language_of_a_page_defaults_to_english() -> None:
    code = Code("NUM999", Severity.ERROR, PAGE, Text("t", "w", "y", ()))
    assert code.text("zh") is code.zh
    assert code.text("en") is code.text("fr") is code.en


@pytest.mark.parametrize(
    ("template", "data", "shown"),
    [
        ("{x}", {"x": 0.123456}, "0.1235"),
        ("{x}", {"x": 1e-10}, "1e-10"),
        ("{x}", {"x": float("nan")}, "nan"),
        ("{x}", {"x": float("-inf")}, "-inf"),
        ("{x}", {"x": 123456}, "123456"),
        ("{x}", {"x": True}, "True"),
        ("{x}", {"x": None}, "None"),
        ("{x} {y}", {"x": 1}, "1 {y}"),
        ("{x} {x}", {"x": "{y}"}, "{y} {y}"),
        ("100 %", {}, "100 %"),
        ("{", {}, "{"),
        ("{0}", {}, "{0}"),
        ("{x.real}", {"x": "a"}, "{x.real}"),
        ("{x:d}", {"x": "a"}, "{x:d}"),
        ("{x[a]}", {"x": 1}, "{x[a]}"),
    ],
)
def test_fill(template: str, data: dict[str, object], shown: str) -> None:
    assert fill(template, data) == shown


@given(st.text(), st.dictionaries(st.text(), st.one_of(st.none(), st.floats(), st.text(), st.integers())))
def test_fill_never_raises(template: str, data: dict[str, object]) -> None:
    assert isinstance(fill(template, data), str)


@given(st.text())
def test_what_is_filled_in_is_never_a_template_itself(value: str) -> None:
    assert fill("<{x}>", {"x": value}) == f"<{value}>"


def test_all_codes_come_from_all_floors() -> None:
    """A sweep over nothing proves nothing."""
    assert {code[:3] for code in CODES} >= {"NUM", "DAT", "CFG", "MOD", "OPT"}
    assert {"NUM001", "DAT100", "CFG200", "MOD100"} <= set(CODES)


def test_a_code_declared_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["finitune.detectors.headroom", "finitune.detectors.headroom"]
    monkeypatch.setattr(subject, "_provider_names", lambda _: iter(names))
    with pytest.raises(ValueError, match=r"NUM030 is declared twice \(again in finitune.detectors.headroom\)"):
        all_codes.__wrapped__()


def test_every_code_written_in_the_source_is_declared() -> None:
    """A ``Code(...)`` outside of every CODES tuple would have no page."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in Path(subject.__file__).parents[1].rglob("*.py"))
    written = set(re.findall(r'Code\(\s*"([A-Z]{3}\d{3})"', text))
    assert {"NUM001", "CFG200"} <= written
    assert not written - set(CODES)


@pytest.mark.parametrize("code", CODES.values(), ids=CODES.keys())
class TestEveryCode:
    def test_is_listed_under_its_own_name(self, code: Code) -> None:
        assert CODES[code.code] is code

    def test_has_a_title_and_a_cure_in_both_languages(self, code: Code) -> None:
        for page in (code.en, code.zh):
            assert page.title.strip()
            assert page.what.strip()
            assert page.cures
            assert all(cure.strip() for cure in page.cures)

    def test_gives_its_reason_in_both_languages_or_in_none(self, code: Code) -> None:
        assert bool(code.en.why.strip()) == bool(code.zh.why.strip())

    def test_speaks_both_languages(self, code: Code) -> None:
        chinese = (code.zh.title, code.zh.what, code.zh.why, *code.zh.cures)
        english = (code.en.title, code.en.what, code.en.why, *code.en.cures)
        assert HAN.search(code.zh.title)
        assert HAN.search("".join(chinese[1:]))
        assert not HAN.search("".join(english))

    def test_gives_the_same_numbers_in_both_languages(self, code: Code) -> None:
        assert placeholders(code.en.what) == placeholders(code.zh.what)
        assert placeholders(code.en.why, *code.en.cures) == placeholders(code.zh.why, *code.zh.cures)
        assert len(code.en.cures) == len(code.zh.cures)

    def test_has_plain_fields_only(self, code: Code) -> None:
        """No attribute, index or number format: a number may be missing, None or not finite (!r takes all)."""
        for page in (code.en, code.zh):
            for template in (page.what, page.why, *page.cures):
                for _, name, form, conversion in string.Formatter().parse(template):
                    if name is not None:
                        assert name.isidentifier()
                        assert not form
                        assert conversion in (None, "r")

    def test_has_no_fields_in_its_title(self, code: Code) -> None:
        assert not placeholders(code.en.title, code.zh.title)


def test_the_page_of_a_detector_is_its_module() -> None:
    page = page_of("NUM030")
    assert page is not None
    assert page.__name__ == "finitune.detectors.headroom"
    assert "What it sees" in (page.__doc__ or "")


@pytest.mark.parametrize("code", ["CFG200", "XXX999", ""])
def test_other_codes_have_no_page_of_their_own(code: str) -> None:
    assert page_of(code) is None
