"""What is found in a batch names its rows: those of row_ids, or content hashes. A healthy step names none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.adapters import bare_batch
from finitune.core.errors import UserError

Batch = dict[str, Tensor]


class Words(nn.Module):
    """Token by token: an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids_BT))
        return logits


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    labels = batch["labels"]
    summed = nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), labels.flatten(), reduction="sum")
    return summed / (labels != -100).sum()


def batch_of(seed: int, *empty: int, rows: int = 4) -> Batch:
    ids = torch.randint(0, 16, (rows, 6), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in empty:
        labels[row] = -100
    return {"input_ids": ids, "labels": labels}


def guarded(**options: Any) -> Any:
    torch.manual_seed(0)
    model = Words()
    return finitune.guard(model, torch.optim.AdamW(model.parameters(), 1e-2), loss_fn, **options)


def test_a_batch_without_targets_names_its_rows_by_content() -> None:
    batch = batch_of(1, 0, 1, rows=2)
    with guarded() as guard:
        guard.step(batch_of(0))
        outcome = guard.step([batch])
    found = next(f for f in outcome.findings if f.code == "DAT100")
    assert [r.digest for r in found.rows] == bare_batch.row_digests(batch)
    assert [(p["micro"], p["index"]) for p in found.data["places"]] == [(0, 0), (0, 1)]
    assert str(found.rows[0]) in found.where


def test_names_of_the_script_are_used_and_micro_batches_told_apart() -> None:
    names = [f"doc{n}" for n in range(8)]
    with guarded(row_ids=names) as guard:
        guard.step([batch_of(0, rows=2), batch_of(1, rows=2)])
        outcome = guard.step([batch_of(2, 0, 1, rows=2), batch_of(3, 0, 1, rows=2)])
    found = next(f for f in outcome.findings if f.code == "DAT100")
    assert [r.source for r in found.rows] == ["doc4", "doc5", "doc6", "doc7"]
    assert [(p["micro"], p["index"]) for p in found.data["places"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_many_rows_without_targets_are_named_wherever_they_came_up() -> None:
    told = []
    with guarded(row_ids=[f"doc{n}" for n in range(200)]) as guard:
        for step in range(20):
            told += [f for f in guard.step(batch_of(step, step % 4)).findings if f.code == "DAT114"]
    assert len(told) == 1
    steps = [p["step"] for p in told[0].data["places"]]
    assert [r.source for r in told[0].rows] == [f"doc{4 * (s - 1) + (s - 1) % 4}" for s in steps]
    assert len(steps) == told[0].data["num_empty"]


@pytest.mark.parametrize("named", [True, False])
def test_an_id_beyond_the_table_names_its_row(named: bool) -> None:
    batch = batch_of(1)
    batch["input_ids"][2, 3] = 99
    with guarded(**({"row_ids": [f"doc{n}" for n in range(8)]} if named else {})) as guard:
        guard.step(batch_of(0))
        with pytest.raises(UserError) as raised:
            guard.step(batch)
    found = raised.value.finding()
    assert found.code == "DAT115"
    assert [r.digest for r in found.rows] == [bare_batch.row_digests(batch)[2]]
    assert (found.rows[0].source == "doc6") is named
    assert found.where.startswith("input_ids[2, 3]: ")
    assert str(found.rows[0]) in str(raised.value)


def test_a_bad_number_in_the_first_batch_names_its_row() -> None:
    batch = {**batch_of(0), "pixels": torch.ones(4, 3)}
    batch["pixels"][1, 2] = float("nan")
    with guarded() as guard:
        found = next(f for f in guard.step(batch).findings if f.code == "DAT111")
    assert [(p["micro"], p["index"]) for p in found.data["places"]] == [(0, 1)]


def test_names_that_cannot_be_had_cost_nothing_but_the_names() -> None:
    with guarded(row_ids=lambda _batch: ["one name for four rows"]) as guard:
        outcome = guard.step(batch_of(1, 0, 1, 2, 3))
    assert [f.code for f in outcome.findings if f.veto] == ["DAT100"]


def test_a_healthy_step_names_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bare_batch, "row_digests", lambda _nest: pytest.fail("a healthy step was named"))
    with guarded() as guard:
        assert all(guard.step(batch_of(n)).committed for n in range(4))
