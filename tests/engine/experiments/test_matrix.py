"""The counterfactual matrix: what every condition makes of every recipe, and what finding the cause costs.

L: the loss is bad, G: a gradient is, ok: the failure is gone. The expected cells were measured on other data and sizes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from engine.experiments.zoo import RECIPES, exploding_gradient, half_optimizer
from finitune.core import registry
from finitune.core.incident import Result, Suspect
from finitune.engine.case import Case
from finitune.engine.experimenting import experiment, perform
from finitune.engine.lab import Lab, Shot
from finitune.engine.port import Ask

OK = ""
PROBES = ("same", "fp32", "bf16", "other_batch", "weights_1", "weights_8")
EXPECTED = {
    "A": ("LG", OK, OK, "LG", None, OK),
    "A2": ("LG", OK, OK, "LG", None, OK),
    "B": ("LG", "LG", "LG", "LG", OK, OK),
    "C": ("LG", "LG", "LG", OK, "LG", "LG"),
    "C2": ("L", "L", "L", OK, "L", "L"),
    "D2": ("G", "G", "G", OK, "G", "G"),
    "E": ("LG", "LG", "LG", "LG", OK, None),
}
"""None: depends on the data (one step before, an overflow may or may not be there), or there is no such state."""


@pytest.fixture(scope="module")
def labs() -> dict[str, Lab]:
    return {name: make() for name, make in RECIPES.items()}


def letters(shot: Shot) -> str:
    loss = OK if math.isfinite(shot.reading.loss) else "L"
    return loss + (OK if math.isfinite(shot.reading.grad_norm) else "G")


def unknown(lab: Lab) -> Case:
    """The lab's case before anything was found out about it."""
    lab.case = replace(lab.case, evidence={}, suspects=())
    return lab.case


def probe(lab: Lab, name: str) -> str | None:
    if name.startswith("weights"):
        snapshot = lab.state_at(lab.before.step - int(name[-1]))
        if snapshot is None:
            return None
        # The batch of the failing step on the older state.
        with lab.standing_at(snapshot):
            return letters(lab.shoot(ask=Ask(step=lab.step)))
    if name == "other_batch":
        return letters(lab.shoot(ask=Ask(step=lab.port.clean_steps()[0])))
    return letters(lab.shoot(None if name == "same" else replace(lab.now, precision=name)))


@pytest.mark.parametrize("recipe", EXPECTED)
def test_every_cell_of_the_matrix_is_as_measured(labs: dict[str, Lab], recipe: str) -> None:
    lab = labs[recipe]
    lab.budget.max_replays = math.inf
    seen = {p: probe(lab, p) for p in PROBES}
    expected = dict(zip(PROBES, EXPECTED[recipe], strict=True))
    assert {p: v for p, v in seen.items() if expected[p] is not None} == {
        p: v for p, v in expected.items() if v is not None
    }


@pytest.mark.parametrize(
    ("recipe", "good", "bad"),
    [
        ("A", {"fp32", "bf16", "islands"}, {"known_good_batch"}),
        ("A2", {"fp32", "bf16", "islands"}, {"known_good_batch"}),
        ("B", {"older_weights", "lower_lr"}, {"known_good_batch"}),
        ("C", {"known_good_batch"}, {"fp32"}),
        ("C2", set(), {"supervised_tokens"}),
        ("D2", {"known_good_batch"}, set()),
        ("E", set(), {"known_good_batch"}),
    ],
)
def test_the_experiments_that_run_tell_the_recipes_apart_at_a_small_cost(
    labs: dict[str, Lab], recipe: str, good: set[str], bad: set[str]
) -> None:
    lab = labs[recipe]
    lab.budget.max_replays, lab.budget.replays = 60.0, 0.0
    case = experiment(lab, unknown(lab))
    assert all(case.result(e) is Result.GOOD for e in good)
    assert all(case.result(e) is Result.BAD for e in bad)
    # A rate is searched for by walking a course at several of them, after state and optimizer have been ruled out.
    assert lab.budget.replays <= (45 if "lower_lr" in good else 18)
    assert sum(e.replays for e in case.evidence.values()) == pytest.approx(lab.budget.replays)


def test_an_overflow_is_not_put_down_to_the_rate_and_its_numbers_are_there_for_who_asks(labs: dict[str, Lab]) -> None:
    lab = labs["A"]
    lab.budget.max_replays = math.inf
    case = experiment(lab, unknown(lab))
    assert "lower_lr" not in case.evidence
    found, _ = perform(lab, case, "lower_lr", registry.load("experiments", "lower_lr"))
    assert found.result is Result.GOOD, "a smaller rate puts an overflow off"
    assert case.good("fp32"), "and fp32 says that it is one"
    assert len(found.numbers["losses_tenth"]) == len(found.numbers["losses_same"]) + 2
    assert not math.isfinite(found.numbers["losses_same"][-1])


def test_a_rate_that_is_too_high_needs_a_course_from_before_the_rise(labs: dict[str, Lab]) -> None:
    lab = labs["B"]
    lab.budget.max_replays = math.inf
    found, _ = perform(lab, unknown(lab), "lower_lr", registry.load("experiments", "lower_lr"))
    numbers = found.numbers
    assert found.result is Result.GOOD
    assert numbers["start_step"] <= lab.before.step - 8
    assert numbers["losses_same"][:1] == numbers["losses_tenth"][:1], "the same state and batch"
    assert numbers["losses_tenth"][-1] < 1.5 * numbers["median_loss"] < numbers["losses_same"][-2]


def test_one_huge_gradient_is_held_by_a_clip_and_not_by_a_smaller_rate() -> None:
    lab = exploding_gradient()
    case = experiment(lab, lab.case)
    assert case.good("tighter_clip")
    assert "lower_lr" not in case.evidence, "the clip came first, as the rise began with a leap"
    lab.budget.max_replays = math.inf
    found, _ = perform(lab, case, "lower_lr", registry.load("experiments", "lower_lr"))
    assert found.result is Result.BAD


def test_an_eps_that_half_cannot_hold_is_found_at_the_update() -> None:
    lab = half_optimizer()
    case = experiment(lab, lab.case)
    assert case.good("adam_eps")
    assert case.bad("fresh_moments")
    assert not {"known_good_batch", "fp32", "reference_optimizer", "lower_lr"} & set(case.evidence)


def test_the_island_of_an_overflow_is_the_module_that_was_localised(labs: dict[str, Lab]) -> None:
    lab = labs["A"]
    lab.budget.max_replays = math.inf
    alone = registry.load("experiments", "islands")
    everywhere, _ = perform(lab, unknown(lab), "islands", alone)
    assert [m.rpartition(".")[2] for m in everywhere.numbers["modules"]] == ["mlp"]
    (name,) = everywhere.numbers["modules"]
    known = Suspect("module", f"{name}.down_proj", {"amax": 7e4})
    found, suspects = perform(lab, unknown(lab).with_suspects(known), "islands", alone)
    assert found.result is Result.GOOD
    assert found.numbers["num_tried"] <= 2 < everywhere.numbers["num_tried"]
    assert suspects[0].data["island"] is True
