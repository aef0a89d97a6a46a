"""What every remedy must be: documented, graded, bilingual, total, and used by some cause or as a last resort."""

from __future__ import annotations

import re
import string
from types import ModuleType

import pytest

from finitune.core import registry
from finitune.core.incident import Safety, Words

NAMES = registry.names("remedies")
SECTIONS = ("What it does:", "What it costs:", "When it is taken back:", "Source:")
TABLE = {
    **dict.fromkeys(("let_pass", "fp32_modules", "bf16", "fp32", "scaler_reset", "repair_tensor"), Safety.SAFE),
    **dict.fromkeys(("adam_eps", "fp32_weights", "math_attention", "safe_softmax", "halt", "retry"), Safety.SAFE),
    **dict.fromkeys(("skip_rows", "drop_batch", "clip", "adaptive_clip", "lower_lr", "reset_moments"), Safety.LOSSY),
    "roll_back": Safety.LOSSY,
}
HAN = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(params=NAMES)
def remedy(request: pytest.FixtureRequest) -> ModuleType:
    return registry.load("remedies", request.param)


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_the_family_is_complete_and_graded() -> None:
    assert {n: registry.load("remedies", n).SAFETY for n in NAMES if n in TABLE} == TABLE


def test_the_docstring_has_all_sections_in_order(remedy: ModuleType) -> None:
    lines = (remedy.__doc__ or "").splitlines()
    assert [line for line in lines if line in SECTIONS] == list(SECTIONS)
    for section in SECTIONS:
        assert lines[lines.index(section) + 1].startswith("    "), f"section {section} is empty"


def test_words_exist_in_both_languages_with_the_same_numbers(remedy: ModuleType) -> None:
    for words in (remedy.SAYS, remedy.ADVICE):
        assert isinstance(words, Words)
        assert words.en.strip()
        assert fields(words.en) == fields(words.zh)
        assert HAN.search(words.zh) or words.zh == words.en, "only a bare setting may read the same"
        assert not HAN.search(words.en)


def test_some_cause_uses_it_or_it_is_the_last_resort(remedy: ModuleType) -> None:
    used = {r for c in registry.names("causes") for r in registry.load("causes", c).REMEDIES}
    assert remedy.__name__.rpartition(".")[2] in used | {"halt"}
