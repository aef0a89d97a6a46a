"""How the memory for snapshots is shared out, and that it is what is then taken."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.units import bytes_text
from finitune.engine.snapshot import SnapshotRing, as_snapshot, state_bytes
from finitune.train import memory
from finitune.train.memory import SnapshotPlan, plan_snapshots
from finitune.train.prepare import Prepared
from finitune.train.recipe import Recipe
from support.runs import loop_of, ready

SMALL = "tiny-llama:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32"
MB = 1 << 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return ready(tmp_path_factory.mktemp("memory"), model=SMALL)


def recipe_with(
    recipe: Recipe, *, optim: str = "adamw_torch_fused", background: bool = True, **fields: object
) -> Recipe:
    return recipe.model_copy(
        update={
            "optim": optim,
            "save_in_background": background,
            "snapshots": recipe.snapshots.model_copy(update=fields),
        }
    )


def planned(prepared: Prepared, free_bytes: int, **fields: object) -> SnapshotPlan:
    return plan_snapshots(recipe_with(prepared.recipe, **fields), prepared.port, free_bytes)  # type: ignore[arg-type]


def weight_bytes(prepared: Prepared) -> int:
    return sum(p.numel() * p.element_size() for _, p in prepared.port.parts.parameters)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_size_of_a_snapshot_is_known_before_the_moments_exist(tmp_path: Path, optim: str, kind: str) -> None:
    """Within one per cent: the step counters, 4 bytes a tensor, are not reckoned."""
    lora = ["lora={r: 8}"] if kind == "lora" else []
    prepared = ready(tmp_path, f"optim={optim}", *lora)
    expected = plan_snapshots(prepared.recipe, prepared.port, 100 * MB).snapshot_bytes
    loop = loop_of(prepared, tmp_path)
    loop.one()
    assert state_bytes(prepared.port) == pytest.approx(expected, rel=0.01)
    assert as_snapshot(prepared.port).num_bytes == state_bytes(prepared.port)


def test_the_copy_for_saves_comes_first_then_the_shadow_then_the_ring(prepared: Prepared) -> None:
    size = 3 * weight_bytes(prepared)
    found = [
        planned(prepared, 4 * count * size, memory_share=0.25, shadow=True, max_count=8)
        for count in (0, 1, 2, 3, 4, 20)
    ]
    assert [(p.background, p.shadow, p.num_slots) for p in found] == [
        (False, False, 0),
        (True, False, 0),
        (True, True, 0),
        (True, True, 1),
        (True, True, 2),
        (True, True, 8),
    ]


def test_without_background_saves_the_ring_has_their_memory(prepared: Prepared) -> None:
    size = 3 * weight_bytes(prepared)
    assert planned(prepared, 4 * 3 * size, background=False).num_slots == 3
    assert planned(prepared, 4 * 3 * size).num_slots == 2
    assert not planned(prepared, 4 * 3 * size, background=False).background


@given(
    free=st.integers(0, 40 * MB),
    share=st.floats(0, 0.99),
    count=st.integers(1, 64),
    shadow=st.booleans(),
    background=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_what_is_planned_fits_the_budget(
    prepared: Prepared, free: int, share: float, count: int, shadow: bool, background: bool
) -> None:
    plan = planned(prepared, free, memory_share=share, max_count=count, shadow=shadow, background=background)
    assert plan.budget_bytes == int(free * share)
    assert plan.used_bytes <= plan.budget_bytes
    assert 0 <= plan.num_slots <= count
    more = plan.used_bytes + plan.snapshot_bytes <= plan.budget_bytes
    assert not more or (plan.num_slots == count and plan.shadow == shadow and plan.background == background)


def test_the_ring_that_is_made_is_the_one_that_was_planned(prepared: Prepared) -> None:
    recipe = recipe_with(prepared.recipe, max_count=5, cost_share=0.07)
    ring = plan_snapshots(recipe, prepared.port, 1 << 30).ring(recipe)
    assert isinstance(ring, SnapshotRing)
    assert (ring.num_slots, ring.distance.cost_share) == (5, 0.07)


def test_a_filled_ring_takes_what_was_said(tmp_path: Path) -> None:
    prepared = ready(tmp_path)
    plan = planned(prepared, 4 * 4 * 3 * weight_bytes(prepared))
    ring, loop = plan.ring(prepared.recipe), loop_of(prepared, tmp_path)
    assert plan.num_slots == 3
    for _ in range(6):
        ring.take(prepared.port, 0.0)
        loop.one()
    held = sum(s.num_bytes for s in ring.taken)
    assert held <= plan.used_bytes - plan.snapshot_bytes  # one is for saves
    assert held == pytest.approx(plan.num_slots * plan.snapshot_bytes, rel=0.5)


def test_a_share_of_nothing_keeps_no_snapshots_and_says_nothing(prepared: Prepared) -> None:
    plan = planned(prepared, 1 << 34, memory_share=0.0)
    assert (plan.num_slots, plan.budget_bytes, plan.used_bytes) == (0, 0, 0)
    assert memory.finding(recipe_with(prepared.recipe, memory_share=0.0), plan) == []
    assert not plan.ring(prepared.recipe).due(1)


def test_where_none_fits_a_note_has_the_numbers(prepared: Prepared) -> None:
    plan = planned(prepared, 1000)
    (finding,) = memory.finding(prepared.recipe, plan)
    assert (finding.code, finding.severity.value) == ("SYS014", "note")
    assert finding.data["needed"] == bytes_text(plan.snapshot_bytes)
    assert finding.data["budget"] == bytes_text(plan.budget_bytes)
    assert finding.data["free"] == bytes_text(1000)


def test_where_some_fit_nothing_is_said_but_in_the_plan(prepared: Prepared) -> None:
    plan = planned(prepared, 1 << 30)
    assert memory.finding(prepared.recipe, plan) == []
    line = memory.derived(plan)
    assert line.name == "snapshots"
    assert bytes_text(plan.used_bytes) in line.why
    assert any(d.name == "snapshots" for d in prepared.plan.derived)


def test_without_a_number_the_memory_that_is_free_now_counts(prepared: Prepared, monkeypatch) -> None:
    class Now:
        available = 123 * MB

    monkeypatch.setattr(psutil, "virtual_memory", Now)
    assert plan_snapshots(prepared.recipe, prepared.port).free_bytes == 123 * MB


@pytest.mark.parametrize("case", ["snapshots switched off", "no room"])
def test_saves_that_are_not_made_in_the_background_are_said_to_be(prepared: Prepared, case: str) -> None:
    """``save_in_background`` is a setting of its own (docs/decisions/0008: "and the plan says so")."""
    off = case == "snapshots switched off"
    plan = planned(prepared, 1 << 34, memory_share=0.0) if off else planned(prepared, 1000)
    assert plan.background or "with the copy for saves" not in memory.derived(plan).why
