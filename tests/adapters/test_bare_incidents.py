"""A guarded bare loop through failures: what failed is named, a cure applied, the run goes on with finite weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.core.errors import UserError
from finitune.engine.snapshot import as_snapshot

Batch = dict[str, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.GELU(), nn.Linear(16, 1))


def weighted(model: nn.Module, batch: Batch) -> Tensor:
    return (batch["weight"] * ((model(batch["x"]) - batch["y"]) ** 2).squeeze(1)).mean()


def batches(count: int, rows: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(rows, 6, generator=generator),
            "y": torch.randn(rows, 1, generator=generator),
            "weight": torch.ones(rows),
        }
        for _ in range(count)
    ]


def guarded(**options: Any) -> Any:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    return finitune.guard(model, optimizer, options.pop("loss_fn", weighted), **options)


def is_finite(guard: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for _, t in guard.port.state_tensors())


def test_a_row_with_an_infinite_weight_is_named_and_left_out(tmp_path: Path) -> None:
    steps = batches(12)
    steps[8]["weight"][2] = float("inf")
    with guarded(run_dir=tmp_path) as guard:
        outcomes = [guard.step(batch) for batch in steps]
        assert is_finite(guard)
    [incident] = guard.incidents
    assert incident.step == 9
    assert incident.outcome in ("cured", "skipped")
    assert any(":3#" in s.name for s in incident.suspects if s.kind == "row"), incident.suspects
    assert outcomes[8].incident is incident
    assert (tmp_path / "journal.jsonl").exists()
    assert list(tmp_path.glob("incidents/*/incident.json"))
    assert all(o.committed for i, o in enumerate(outcomes) if i != 8)


def test_one_nan_in_one_backward_pass_does_not_reach_the_weights() -> None:
    calls = []

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, *grads: Tensor) -> Tensor:
            calls.append(1)
            return grads[0] * (float("nan") if len(calls) == 6 else 1.0)

    with guarded(loss_fn=lambda m, b: Once.apply(weighted(m, b))) as guard:
        outcomes = [guard.step(batch) for batch in batches(10)]
        assert is_finite(guard)
    [incident] = guard.incidents
    assert incident.step == 6
    assert incident.verdict.value == "not_reproduced"
    assert outcomes[-1].committed


def test_a_corrupt_moment_is_caught_in_the_same_step() -> None:
    with guarded() as guard:
        steps = batches(12)
        for batch in steps[:6]:
            guard.step(batch)
        next(iter(guard.port.optimizer.state.values()))["exp_avg"].view(-1)[3] = float("nan")
        guard.step(steps[6])
        assert is_finite(guard)
        for batch in steps[7:]:
            assert guard.step(batch).committed
    assert guard.incidents[0].step == 7


def test_going_back_and_walking_forward_gives_the_same_bits() -> None:
    with guarded() as guard:
        for batch in batches(9):
            guard.step(batch)
        now = as_snapshot(guard.port)
        before = torch.get_rng_state()
        earlier = guard.engine.timeline.state_at(4)
        assert earlier.step == 4
        assert as_snapshot(guard.port).mark == now.mark
        earlier.restore(guard.port)
        for _ in range(5):
            guard.engine.one()
        assert all(torch.equal(now.tensors[n], t) for n, t in guard.port.state_tensors())
        assert torch.equal(before, torch.get_rng_state())


def test_what_the_loss_function_raises_reaches_the_loop_and_nothing_has_happened() -> None:
    def failing(model: nn.Module, batch: Batch) -> Tensor:
        loss = weighted(model, batch)
        if batch.get("bad") is not None:
            raise ZeroDivisionError("in the loop's own code")
        return loss

    with guarded(loss_fn=failing) as guard:
        good = batches(4)
        guard.step(good[0])
        mark, draws = as_snapshot(guard.port).mark, torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            guard.step({**good[1], "bad": torch.ones(4)})
        assert as_snapshot(guard.port).mark == mark
        assert torch.equal(draws, torch.get_rng_state())
        assert guard.step(good[2]).committed
        for bad in (lambda m, b: m(b["x"]) - b["y"], lambda m, b: 1.0, lambda m, b: weighted(m, b).detach()):
            with guarded(loss_fn=bad) as other, pytest.raises(UserError, match="SYS420"):
                other.step(good[0])


def test_a_step_without_any_label_is_not_a_failure() -> None:
    def causal(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    ids = torch.randint(0, 8, (2, 5))
    with finitune.guard(model, torch.optim.AdamW(model.parameters()), causal) as guard:
        guard.step({"ids": ids, "labels": ids})
        outcome = guard.step({"ids": ids, "labels": torch.full_like(ids, -100)})
    assert [f.code for f in outcome.findings if f.veto] == ["DAT100"]
    assert not outcome.committed
    assert guard.incidents == []


def test_a_model_that_counts_its_calls_cannot_be_replayed_and_that_is_said() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    model = Counting()
    with finitune.guard(model, torch.optim.AdamW(model.parameters()), weighted) as guard:
        steps = batches(3)
        assert "SYS427" in [f.code for f in guard.step(steps[0]).findings]
        steps[1]["weight"][0] = float("inf")
        assert not guard.step(steps[1]).committed
        assert guard.step(steps[2]).committed
        assert is_finite(guard)
    assert guard.incidents == []


def test_refusals_say_what_is_wrong() -> None:
    model = net()
    with pytest.raises(UserError, match="SYS421"):
        finitune.guard(model, torch.optim.LBFGS(model.parameters()), weighted)
    with pytest.raises(UserError, match="SYS425"):
        guarded(policy="brave")
    sparse = nn.Sequential(nn.EmbeddingBag(8, 4, sparse=True), nn.Linear(4, 1))
    guard = finitune.guard(sparse, torch.optim.SGD(sparse.parameters(), 0.1), lambda m, b: m(b).mean())
    with guard, pytest.raises(UserError, match="SYS422"):
        guard.step(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(UserError, match="SYS429"):
        guard.step(torch.zeros(2, 3, dtype=torch.long))


def test_weights_that_are_not_finite_at_the_start_are_said() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with finitune.guard(model, torch.optim.AdamW(model.parameters()), weighted, max_replays=0) as guard:
        assert [f.code for f in guard.findings] == ["MOD110"]
        assert guard.findings[0] in guard.step(batches(1)[0]).findings


def test_without_memory_for_snapshots_failures_are_still_refused() -> None:
    with guarded(memory_share=0.0) as guard:
        steps = batches(3)
        assert "SYS426" in [f.code for f in guard.step(steps[0]).findings]
        steps[1]["weight"][0] = float("nan")
        guard.step(steps[1])
        assert guard.step(steps[2]).committed
        assert is_finite(guard)
