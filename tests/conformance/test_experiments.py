"""What every experiment must be: documented, worded in both languages, total, and without a trace."""

from __future__ import annotations

import inspect
import json
import math
import re
import string
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.experiments.zoo import RECIPES, exploding_gradient, half_optimizer
from finitune.core import registry
from finitune.core.incident import Evidence, Result, Suspect, Trigger, Words
from finitune.core.types import Finding, Reading, Severity
from finitune.engine import experimenting
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import BudgetSpent, Lab
from finitune.numerics.fingerprint import fingerprint
from finitune.numerics.seeds import GeneratorStates, generators_kept

NAMES = registry.names("experiments")
SECTIONS = (r"^What it changes:", r"^(?:What it costs|Cost):", r"^Source:")
LABS = {"A2": RECIPES["A2"], "B": RECIPES["B"], "C": RECIPES["C"], "D": exploding_gradient, "E": half_optimizer}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def module(name: str) -> ModuleType:
    return registry.load("experiments", name)


@pytest.fixture(scope="module")
def labs() -> dict[str, Lab]:
    made = {key: make() for key, make in LABS.items()}
    for lab in made.values():
        lab.budget.max_replays = math.inf
    return made


def test_the_page_says_what_changes_what_outcomes_mean_what_it_costs_and_whence(module: ModuleType) -> None:
    page = module.__doc__ or ""
    places = [match.end() if (match := re.search(section, page, re.M)) else None for section in SECTIONS]
    assert None not in places, f"missing: {SECTIONS[places.index(None)]}"
    ends = [place for place in places if place is not None]
    assert ends == sorted(ends), "the sections are in order"
    assert all(page[end:].strip() for end in ends), "none is empty"
    assert {"GOOD:", "BAD:"} <= set(re.findall(r"\b(?:GOOD|BAD):", page))


def test_it_has_a_place_and_a_price(module: ModuleType) -> None:
    assert isinstance(module.ORDER, int | float)
    assert isinstance(module.COST, int | float)
    assert 0 <= module.COST < 20


def test_both_outcomes_have_words_in_both_languages(module: ModuleType) -> None:
    for outcome in (Result.GOOD, Result.BAD):
        words = module.SAYS[outcome]
        assert isinstance(words, Words)
        assert words.en.isascii()
        assert words.en.endswith(".")
        assert words.zh.endswith("\u3002")
        assert re.search("[\u4e00-\u9fff]", words.zh)
        assert _fields(words.en) == _fields(words.zh), "both languages tell the same numbers"


def _fields(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field}


def test_wanted_and_run_take_what_the_family_gives(module: ModuleType) -> None:
    assert list(inspect.signature(module.wanted).parameters) == ["case"]
    assert list(inspect.signature(module.run).parameters) == ["lab", "case"]


_RESULTS = st.sampled_from(Result)
_NUMBERS = st.one_of(st.none(), st.floats(), st.text(max_size=3), st.lists(st.floats(), max_size=12))


@given(
    trigger=st.sampled_from(Trigger),
    loss=st.floats(),
    norm=st.floats(),
    evidence=st.dictionaries(st.sampled_from(NAMES), _RESULTS, max_size=6),
    past=st.dictionaries(st.sampled_from(["median_loss", "median_grad_norm"]), st.none() | st.floats()),
    losses=st.lists(st.floats(), max_size=12),
    precision=st.sampled_from(["fp32", "fp16", "bf16", "fp16-emulated", ""]),
    named=st.sampled_from([(), (Suspect("op", "aten.mm", {"module": "a.attn"}),), (Suspect("module", "", {}),)]),
)
@settings(max_examples=60, deadline=None)
def test_wanted_is_total_and_answers_yes_or_no(
    trigger: Trigger, loss: float, norm: float, evidence: Any, past: Any, losses: Any, precision: str, named: Any
) -> None:
    found = {n: Evidence(n, r) for n, r in evidence.items()}
    facts = {"precision": precision}
    finding = Finding("NUM001", Severity.ERROR)
    case = Case(trigger, finding, Reading(3, loss, norm), facts, {**past, "recent_losses": losses}, None, named, found)
    for member in NAMES:
        assert registry.load("experiments", member).wanted(case) in (True, False)


@pytest.mark.parametrize("key", LABS)
def test_run_leaves_no_trace_and_its_numbers_are_json(
    labs: dict[str, Lab], key: str, name: str, module: ModuleType
) -> None:
    lab = labs[key]
    before, generators = _state(lab), GeneratorStates.now()
    with generators_kept():
        found, suspects, refusal = None, (), "-"
        try:
            found, suspects = module.run(lab, lab.case)
        except NotPossible as reason:
            refusal = str(reason)
    assert refusal
    assert _state(lab) == before
    assert lab.port.conditions == lab.now
    assert all(p.grad is None for _, p in lab.port.parameters())
    assert GeneratorStates.now().python == generators.python
    if found is not None:
        assert found.experiment == name
        assert found.result in (Result.GOOD, Result.BAD)
        assert _fields(module.SAYS[found.result].en) <= set(found.numbers)
        assert json.loads(json.dumps(found.to_json()))
        assert all(json.dumps(s.to_json()) for s in suspects)


@pytest.mark.parametrize("left", [0.0, 1.0, 2.0])
def test_a_budget_that_ends_at_any_point_leaves_no_trace(
    labs: dict[str, Lab], name: str, module: ModuleType, left: float
) -> None:
    lab = labs["A2"]
    before = _state(lab)
    lab.budget.max_replays = lab.budget.replays + left
    try:
        module.run(lab, lab.case)
    except (BudgetSpent, NotPossible):
        pass
    finally:
        lab.budget.max_replays = math.inf
    assert _state(lab) == before, name
    assert lab.port.conditions == lab.now
    assert all(p.grad is None for _, p in lab.port.parameters())


def _state(lab: Lab) -> str:
    return fingerprint(lab.port.state_tensors(), lab.port.state_record()).digest


def test_no_experiment_was_banned_for_a_trace() -> None:
    assert experimenting._leave_traces == {}
