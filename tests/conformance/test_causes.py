"""What every cause must be: documented, in both languages, with cures that are none of the known wrong ones."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from engine.causes.scenes import OF_CAUSES
from finitune.core import registry
from finitune.core.codes import Code, all_codes, fill

NAMES = registry.names("causes")
SECTIONS = ("What it sees:", "Why it is bad:", "Example:", "What to do:", "Source:")
TABLE = {
    "nothing_supervised": ("A", "DAT400"),
    "forward_overflow": ("B", "NUM400"),
    "backward_overflow": ("C", "NUM401"),
    "half_optimizer": ("D", "OPT400"),
    "masked_row": ("E", "NUM402"),
    "attention_kernel": ("F", "NUM403"),
    "not_reproducible": ("G/T", "SYS400"),
    "bad_weights": ("H", "MOD400"),
    "learning_rate": ("I", "OPT401"),
    "corrupt_state": ("T", "SYS403"),
    "resume_state": ("U", "OPT405"),
    "harmless_outlier": ("N", "NUM406"),
    "lost_updates": ("J", "OPT402"),
    "loss_math": ("K", "NUM404"),
    "loss_normalisation": ("L", "OPT403"),
    "no_gradient": ("M", "MOD401"),
    "bad_row": ("N", "DAT401"),
    "vocabulary": ("O", "MOD402"),
    "stop_token": ("P", "DAT402"),
    "router": ("Q", "MOD403"),
    "optimizer_bug": ("R", "OPT404"),
    "wrong_precision": ("S", "SYS402"),
    "model_math": ("W", "NUM405"),
    "exploding_gradient": ("I", "OPT406"),
}
# Advice found in threads that did not help or did harm, and that no page may give.
RATE = r"learning[_ ]rate|\blr\b|学习率"
WRONG_EVERYWHERE = (
    r"label smoothing|loss_scale ?= ?8|static (loss )?scale|logging_nan_inf_filter|nan_to_num|try another model|"
    r"re-?download everything|downgrade|0\.3\.0|train (on|longer)|skip the nan"
)
WRONG = {
    "nothing_supervised": rf"{RATE}|precision|fp16|bf16|skipped automatically",
    "forward_overflow": rf"{RATE}|max_grad_norm|clip_grad|clamp the loss|label smoothing",
    "backward_overflow": rf"{RATE}|loss_scale: 8|fixed scale",
    "half_optimizer": rf"{RATE}|peft ?[<=]|version",
    "masked_row": RATE,
    "attention_kernel": rf"{RATE}|fp16|gradient_accumulation",
    "not_reproducible": rf"{RATE}|max_grad_norm",
    "bad_weights": rf"{RATE}|autocast|precision: fp32",
    "bad_row": RATE,
    "loss_math": rf"{RATE}|skip the step|hardware",
    "lost_updates": r"(higher|larger|raise)[^.]*(rate|lr)|(增大|提高)学习率",
    "loss_normalisation": r"callback|divide the log",
    "no_gradient": RATE,
    "vocabulary": RATE,
    "stop_token": r"stopping_criteria|stop_words|at inference",
    "router": r"raise the coefficient|router_aux_loss_coef",
    "optimizer_bug": rf"{RATE}|precision: (fp16|bf16)",
    "wrong_precision": RATE,
    "corrupt_state": RATE,
    "harmless_outlier": rf"{RATE}|max_grad_norm",
    "model_math": RATE,
    "resume_state": r"precision: ",
    "learning_rate": r"precision: |rows named",
    "exploding_gradient": r"learning_rate:|precision: ",
}


@pytest.fixture(params=NAMES)
def cause(request: pytest.FixtureRequest) -> ModuleType:
    return registry.load("causes", request.param)


def short_name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def cures(code: Code) -> str:
    return "\n".join((*code.en.cures, *code.zh.cures)).lower()


def test_the_family_is_what_the_taxonomy_has() -> None:
    found = {n: (registry.load("causes", n).FAULT_CLASS, registry.load("causes", n).CAUSE.code) for n in NAMES}
    assert {n: found[n] for n in TABLE} == TABLE
    assert set(WRONG) == set(TABLE) == set(OF_CAUSES), "every cause has a scene, and advice that it must not give"


def test_the_docstring_has_all_sections_in_order(cause: ModuleType) -> None:
    lines = (cause.__doc__ or "").splitlines()
    assert [line for line in lines if line in SECTIONS] == list(SECTIONS)
    for section in SECTIONS:
        assert lines[lines.index(section) + 1].startswith("    "), f"section {section} is empty"


def test_sources_are_addresses_of_threads_or_papers(cause: ModuleType) -> None:
    source = (cause.__doc__ or "").partition("Source:")[2]
    assert re.search(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+|\b(19|20)\d\d\b", source)


def test_its_code_is_declared_and_its_remedies_exist(cause: ModuleType) -> None:
    assert cause.CODES == (cause.CAUSE,)
    assert all_codes()[cause.CAUSE.code] is cause.CAUSE
    assert set(cause.REMEDIES) <= set(registry.names("remedies"))
    assert len(set(cause.REMEDIES)) == len(cause.REMEDIES)


def test_its_title_says_that_it_is_a_cause_in_both_languages(cause: ModuleType) -> None:
    assert cause.CAUSE.en.title.startswith("cause: ")
    assert cause.CAUSE.zh.title.startswith("原因：")


def test_cures_speak_to_scripts_as_well(cause: ModuleType) -> None:
    if cause.CAUSE.severity.value == "error":
        assert "script" in " ".join(cause.CAUSE.en.cures) or "kernel of your own" in " ".join(cause.CAUSE.en.cures)


def test_its_own_scene_fills_the_page_with_numbers(cause: ModuleType) -> None:
    weight = cause.weigh(OF_CAUSES[short_name(cause)])
    for language in ("en", "zh"):
        page = cause.CAUSE.text(language)
        for template in (page.what, page.why, *page.cures):
            assert "{" not in fill(template, weight.data), template


def test_wrong_advice_is_absent(cause: ModuleType) -> None:
    told = cures(cause.CAUSE)
    assert not re.search(WRONG[short_name(cause)], told)
    assert not re.search(WRONG_EVERYWHERE, told)


def test_the_search_for_wrong_advice_can_fail() -> None:
    assert re.search(WRONG["forward_overflow"], "halve the learning_rate")
    assert re.search(WRONG["lost_updates"], "use a higher learning rate")
    assert re.search(WRONG_EVERYWHERE, "downgrade peft")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("learning_rate", "exploding_gradient", "resume_state")])
def test_only_causes_that_prove_it_may_lower_the_rate(name: str) -> None:
    assert "lower_lr" not in registry.load("causes", name).REMEDIES
