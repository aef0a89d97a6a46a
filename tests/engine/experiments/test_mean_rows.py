"""mean_rows: rows out of proportion become the mean of the others for one replay; only a loss that falls says so."""

from __future__ import annotations

import math

import pytest
import torch

from engine.experiments.port import VOCAB, HalfPort, causal_loss, text
from engine.experiments.test_single import made, trained
from finitune.core.incident import Result, Trigger
from finitune.engine.experiments import mean_rows
from finitune.engine.lab import Lab
from finitune.models.tiny import tiny_llama


def run_with(rows: list[int], factor: float, *, tables: tuple[str, ...] = ("lm_head",), frozen: bool = False) -> Lab:
    model = tiny_llama(0, hidden=32, layers=1, heads=2, kv_heads=2, mlp=32, vocab=VOCAB, positions=64)
    with torch.no_grad():
        for name in tables:
            model.get_submodule(name).weight[rows] *= factor
    model.lm_head.weight.requires_grad_(not frozen)
    trainable = [p for p in model.parameters() if p.requires_grad]
    port = HalfPort(model.train(), torch.optim.AdamW(trainable, lr=1e-3), causal_loss, text(30))
    return trained(0, Trigger.SILENT, port=port)


@pytest.mark.parametrize("factor", [40.0, 1000.0])
@pytest.mark.parametrize("tables", [("lm_head",), ("lm_head", "model.embed_tokens")])
def test_rows_that_take_what_belongs_to_others_are_named(factor: float, tables: tuple[str, ...]) -> None:
    lab = run_with([VOCAB - 2, VOCAB - 1], factor, tables=tables)
    before = {n: t.clone() for n, t in lab.port.model.named_parameters()}
    found, suspects = made(lab, "mean_rows")
    assert (found.result, found.numbers["first"]) == (Result.GOOD, "lm_head.weight")
    assert found.numbers["loss"] < found.numbers["was"]
    assert sorted(found.numbers["tokens"]) == [VOCAB - 2, VOCAB - 1]
    assert {s.name for s in suspects} == {f"{t}.weight" for t in tables}
    assert suspects[0].name == "lm_head.weight"
    assert all(torch.equal(t, before[n]) for n, t in lab.port.model.named_parameters())
    assert "{" not in mean_rows.SAYS[Result.GOOD].say(found.numbers)


def test_rows_that_the_model_does_not_use_are_not_accused() -> None:
    found, suspects = made(run_with([VOCAB - 1], 1000.0, tables=("model.embed_tokens",)), "mean_rows")
    assert (found.result, suspects) == (Result.BAD, ())
    assert "{" not in mean_rows.SAYS[Result.BAD].say(found.numbers)


@pytest.mark.parametrize("lab", [run_with([5], 1.0), run_with([5], 1000.0, frozen=True)])
def test_where_no_trained_row_is_out_of_proportion_nothing_is_computed(lab: Lab) -> None:
    assert made(lab, "mean_rows")[0].result is Result.NOT_RUN
    assert lab.budget.replays == 0


@pytest.mark.parametrize(
    ("was", "loss", "fair", "owed"),
    [
        (5.0, 4.0, 0.1, True),
        (5.0, 4.9, 0.1, False),  # 9.5 % of the probability: less than their fair share
        (5.0, 4.97, 1e-4, False),  # 3 %: not worth a change
        (5.0, 5.5, 0.01, False),
        (math.inf, 4.0, 0.1, True),
        (math.nan, 4.0, 0.1, True),
        (5.0, math.nan, 0.1, False),
        (math.inf, math.inf, 0.1, False),
    ],
)
def test_what_rows_owe_is_measured_by_the_fall_of_the_loss(was: float, loss: float, fair: float, owed: bool) -> None:
    assert mean_rows.is_owed_back(was, loss, fair) is owed
