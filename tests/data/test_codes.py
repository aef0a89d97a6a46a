"""The pages of the data codes: both languages say the same numbers."""

from __future__ import annotations

import string

import pytest

from finitune.core.codes import Code, Text
from finitune.core.messages.en.data import TEXTS as EN
from finitune.core.messages.zh.data import TEXTS as ZH
from finitune.data.codes import CODES


def names_in(page: Text) -> set[str]:
    parts = (page.what, page.why, *page.cures)
    return {name for p in parts for _, name, _, _ in string.Formatter().parse(p) if name}


@pytest.mark.parametrize("code", CODES, ids=lambda c: c.code)
def test_both_languages_are_whole_and_use_the_same_numbers(code: Code) -> None:
    assert names_in(code.en) == names_in(code.zh)
    assert len(code.en.cures) == len(code.zh.cures) >= 1
    assert code.en.title != code.zh.title
    assert all(ord(c) < 128 for c in code.en.what + code.en.why)


def test_codes_are_data_codes_and_distinct() -> None:
    numbers = [c.code for c in CODES]
    assert len(set(numbers)) == len(numbers)
    assert all("DAT001" <= n <= "DAT099" for n in numbers)


def test_interface_words_have_the_same_keys_and_gaps() -> None:
    assert EN.keys() == ZH.keys()
    for key in EN:
        gaps = [{n for _, n, _, _ in string.Formatter().parse(t[key]) if n} for t in (EN, ZH)]
        assert gaps[0] == gaps[1], key
