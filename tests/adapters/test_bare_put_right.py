"""Faults that a look finds and a model tells how to repair: an incident before the first step of a guarded script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.models.tiny import tiny_llama

HEAD, FREQUENCIES = "lm_head.weight", "model.rotary_emb.inv_freq"
STEPS = 6


def batch_of(step: int) -> Tensor:
    return torch.randint(4, 56, (4, 12), generator=torch.Generator().manual_seed(step))


def loss_fn(model: Any, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def in_half(model: Any, ids_BT: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return loss_fn(model, ids_BT)


def loud_head(model: Any) -> None:
    model.lm_head.weight.data[60:64] *= 200.0


def loud_embedding(model: Any) -> None:
    model.model.embed_tokens.weight.data[60:64] *= 200.0


def lost_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.zero_()


def sound(_model: Any) -> None:
    """Nothing."""


def made(spoil: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = tiny_llama(0, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64).train()
    spoil(model)
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def plain(spoil: Any) -> dict[str, Tensor]:
    model, optimizer = made(spoil)
    for step in range(STEPS):
        loss_fn(model, batch_of(step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def guarded(spoil: Any, *, loss: Any = loss_fn, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model, optimizer = made(spoil)
    with finitune.guard(model, optimizer, loss, **options) as guard:
        for step in range(STEPS):
            assert guard.step(batch_of(step)).committed
    return guard, dict(model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def told(guard: Any) -> list[tuple[Any, ...]]:
    return [(i.step, i.diagnosis.code, i.remedy, i.outcome) for i in guard.incidents]


def test_a_lost_buffer_is_computed_anew_and_the_run_has_the_bits_of_one_that_had_it() -> None:
    guard, weights = guarded(lost_buffer)
    assert told(guard) == [(1, "MOD400", "repair_tensor", "cured")]
    assert guard.incidents[0].diagnosis.top.where == FREQUENCIES
    assert same(weights, plain(sound))


@pytest.mark.parametrize("options", [{}, {"loss": in_half, "scaler": torch.amp.GradScaler("cpu")}])
def test_loud_rows_become_the_mean_before_anything_is_trained(options: dict[str, Any]) -> None:
    guard, weights = guarded(loud_head, **options)
    assert told(guard) == [(1, "MOD402", "repair_tensor", "cured")]
    incident = guard.incidents[0]
    assert (incident.diagnosis.top.where, incident.rows, incident.replays < 8) == (HEAD, (), True)
    lengths = weights[HEAD].norm(dim=1)
    assert float(lengths[60:64].max()) < 5 * float(lengths.median())


@pytest.mark.parametrize(
    ("spoil", "policy", "expected"),
    [
        (loud_head, "observe", [(1, "MOD402", None, "observed")]),
        # The mean gives up what these rows held: not without loss.
        (loud_head, "safe", [(1, "MOD402", None, "observed")]),
        (lost_buffer, "observe", [(1, "MOD400", None, "observed")]),
        (loud_embedding, "auto", []),
    ],
)
def test_what_is_not_allowed_or_not_borne_out_changes_no_bit(spoil: Any, policy: str, expected: Any) -> None:
    guard, weights = guarded(spoil, policy=policy)
    assert told(guard) == expected
    assert same(weights, plain(spoil))


def test_safe_allows_what_loses_nothing_and_without_replays_nothing_is_looked_into() -> None:
    assert told(guarded(lost_buffer, policy="safe")[0]) == [(1, "MOD400", "repair_tensor", "cured")]
    guard, weights = guarded(lost_buffer, max_replays=0)
    assert told(guard) == []
    assert same(weights, plain(lost_buffer))


def test_two_faults_are_two_incidents_at_the_same_batch() -> None:
    def both(model: Any) -> None:
        loud_head(model)
        lost_buffer(model)

    guard, _ = guarded(both)
    assert [(t[0], t[1], t[3]) for t in told(guard)] == [(1, "MOD400", "cured"), (1, "MOD402", "cured")]


def test_it_is_journalled_before_it_acts_and_kept_in_a_capsule(tmp_path: Path) -> None:
    guard, _ = guarded(loud_head, run_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines if line["kind"] in ("step", "treatment", "incident")]
    assert kinds[:4] == ["step", "treatment", "incident", "step"]
    treatment = next(line for line in lines if line["kind"] == "treatment")
    assert (treatment["redo"], treatment["mends"][0]["names"]) == (False, [HEAD])
    assert guard.incidents[0].capsule is not None


def test_a_run_that_goes_back_to_its_very_start_is_repaired_again() -> None:
    model, optimizer = made(loud_head)
    guard = finitune.guard(model, optimizer, loss_fn)
    guard.step(batch_of(0))
    start = guard.ring.taken[0]
    guard.step(batch_of(1))
    start.restore(guard.port)
    lengths = model.lm_head.weight.detach().norm(dim=1)
    assert float(lengths[60]) > 50 * float(lengths.median())
    guard.engine.one()
    assert [(t[1], t[3]) for t in told(guard)] == [("MOD402", "cured"), ("MOD402", "cured")]
    guard.close()


def test_weights_that_go_bad_later_come_back_from_after_the_repair() -> None:
    model, optimizer = made(loud_head)
    with finitune.guard(model, optimizer, loss_fn) as guard:
        for step in range(STEPS):
            if step == 3:
                model.lm_head.weight.data[7, 0] = torch.nan
            guard.step(batch_of(step))
    assert [i.remedy for i in guard.incidents] == ["repair_tensor", "repair_tensor"]
    lengths = model.lm_head.weight.detach().norm(dim=1)
    assert float(lengths.max()) < 5 * float(lengths.median())
