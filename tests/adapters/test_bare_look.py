"""What the looks of a guarded script find is never lost, and a healthy run pays nothing for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.core.errors import Halted
from finitune.core.journal import read

Batch = dict[str, Any]


class Words(nn.Module):
    """Token by token: an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids_BT))
        return logits


def words() -> Words:
    torch.manual_seed(0)
    return Words()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def batch_of(seed: int, supervised: int = 6) -> Batch:
    ids = torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, supervised:] = -100
    return {"input_ids": ids, "labels": labels}


def guarded(model: nn.Module, loss_fn: Any = cross_entropy, **options: Any) -> Any:
    return finitune.guard(model, torch.optim.AdamW(model.parameters(), 1e-2), loss_fn, **options)


def test_what_is_found_at_the_start_is_there_where_the_first_step_halts(tmp_path: Any, caplog: Any) -> None:
    model = words()
    with torch.no_grad():
        model.head.weight[3, 2] = float("nan")
    with guarded(model, run_dir=tmp_path) as guard:
        assert [f.code for f in guard.findings] == ["MOD110"]
        with pytest.raises(Halted):
            guard.step(batch_of(0))
        assert "MOD110" in [f.code for f in guard.untold]
    assert "MOD110" in caplog.text
    records = list(read(tmp_path / "journal.jsonl"))
    assert "MOD110" in [r.get("code") for r in records if r["kind"] == "finding"]


def test_findings_of_the_first_batch_and_pass_are_told_with_the_first_outcome() -> None:
    model = words()
    detached = lambda m, b: cross_entropy(lambda ids: m.head(m.embed(ids).detach()), b)  # noqa: E731
    with guarded(model, detached) as guard:
        first = guard.step({**batch_of(0), "weights": torch.tensor([1.0, float("inf")])})
        assert {"DAT111", "MOD114"} <= {f.code for f in first.findings}
        assert not {"DAT111", "MOD114"} & {f.code for f in guard.step(batch_of(1)).findings}
        assert {"DAT111", "MOD114"} <= {f.code for f in guard.findings}


def test_rows_without_targets_are_counted_over_the_run() -> None:
    with guarded(words()) as guard:
        mixed = [batch_of(i) for i in range(16)]
        for batch in mixed:
            batch["labels"][0] = -100
        told = [f.code for batch in mixed for f in guard.step(batch).findings]
        assert told.count("DAT114") == 1


@pytest.mark.parametrize("check", [False, True])
def test_only_on_request_the_loss_function_is_called_more_often(check: bool) -> None:
    calls = [0]

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        calls[0] += 1
        return cross_entropy(model, batch)

    with guarded(words(), counted, check_accumulation=check) as guard:
        found = guard.step([batch_of(0, 6), batch_of(1, 1)]).findings
    assert (calls[0] == 2) is not check
    assert ("OPT112" in [f.code for f in found]) is check


def test_a_look_that_breaks_is_said_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr("finitune.adapters.bare_look.at_start", broken)
    with guarded(words()) as guard:
        outcome = guard.step(batch_of(0))
    assert outcome.committed
    assert [f.code for f in outcome.findings] == ["SYS432"]
