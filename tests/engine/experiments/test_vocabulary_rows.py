"""Rows of the vocabulary that are out of scale: found, tried at the usual length, and put back bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from engine.experiments.port import VOCAB, HalfPort, causal_loss, text
from engine.experiments.test_single import made, trained
from finitune.core.incident import Result, Trigger
from finitune.engine.experiments import vocabulary_rows
from finitune.engine.lab import Lab
from finitune.models.tiny import tiny_llama


def run_with(rows: list[int], factor: float, trigger: Trigger = Trigger.RUNAWAY, *, tied: int = 0) -> Lab:
    """The first step of a run in which some rows are ``factor`` times as long."""
    model = tiny_llama(0, hidden=32, layers=1, heads=2, kv_heads=2, mlp=32, vocab=VOCAB, positions=64, tied=tied)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[rows] *= factor
    port = HalfPort(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3), causal_loss, text(30))
    return trained(1, trigger, port=port)


@pytest.mark.parametrize("tied", [0, 1])
@pytest.mark.parametrize("factor", [300.0, 1000.0])
def test_loud_rows_are_named_with_their_tokens(tied: int, factor: float) -> None:
    rows = [5, 11]
    lab = run_with(rows, factor, tied=tied)
    assert lab.case.reading.loss > 1.5 * math.log(VOCAB)
    before = {n: t.clone() for n, t in lab.port.model.named_parameters()}
    found, suspects = made(lab, "vocabulary_rows")
    assert found.result is Result.GOOD
    assert sorted(found.numbers["tokens"]) == rows
    assert found.numbers["times"] == pytest.approx(factor, rel=0.5)
    assert {s.name for s in suspects} == {"model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])}
    assert all(torch.equal(t, before[n]) for n, t in lab.port.model.named_parameters())
    assert "{" not in vocabulary_rows.SAYS[Result.GOOD].say(found.numbers)


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.001, 0.0])
def test_rows_of_trained_unused_and_new_tokens_are_in_scale(factor: float) -> None:
    found, suspects = made(run_with([5, 11], factor), "vocabulary_rows")
    assert (found.result, found.numbers["num_rows"], suspects) == (Result.BAD, 0, ())
    assert "{" not in vocabulary_rows.SAYS[Result.BAD].say(found.numbers)


def test_rows_that_are_out_of_scale_are_not_accused_of_a_loss_that_is_not_high() -> None:
    lab = run_with([VOCAB - 1], 12.0)
    assert lab.case.reading.loss < 1.5 * math.log(VOCAB)
    assert made(lab, "vocabulary_rows")[0].result is Result.BAD


def test_many_long_rows_are_no_outliers() -> None:
    assert made(run_with(list(range(0, VOCAB, 4)), 300.0), "vocabulary_rows")[0].numbers["num_rows"] == 0


def test_a_row_that_is_not_finite_is_left_to_the_scan_of_the_state() -> None:
    lab = run_with([5], math.inf, Trigger.LOSS)
    assert made(lab, "vocabulary_rows")[0].numbers["num_rows"] == 0
