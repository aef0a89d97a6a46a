"""computed_buffers: what the configuration gives in place of what the buffers hold; the loss must not get worse."""

from __future__ import annotations

import pytest
import torch

from engine.experiments.port import VOCAB, HalfPort, causal_loss, text
from engine.experiments.test_single import made, trained
from finitune.core.incident import Result, Trigger
from finitune.engine.experiments import computed_buffers
from finitune.engine.lab import Lab
from finitune.models.tiny import tiny_llama

NAME = "model.rotary_emb.inv_freq"
TRAINED = 40
"""Steps of training before something happens to the buffer, so that the weights know it."""


def run_with(factor: float, steps: int = 0) -> Lab:
    model = tiny_llama(0, hidden=32, layers=1, heads=2, kv_heads=2, mlp=32, vocab=VOCAB, positions=64)
    port = HalfPort(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-2), causal_loss, text(TRAINED + 2))
    lab = trained(steps, Trigger.SILENT, port=port)
    model.model.rotary_emb.inv_freq.mul_(factor)
    return lab


@pytest.mark.parametrize("factor", [0.0, 300.0])
def test_a_lost_buffer_is_named_and_put_back(factor: float) -> None:
    lab = run_with(factor, TRAINED)
    before = lab.port.model.get_buffer(NAME).clone()
    found, suspects = made(lab, "computed_buffers")
    assert found.result is Result.GOOD
    assert (found.numbers["first"], suspects[0].name, suspects[0].kind) == (NAME, NAME, "buffer")
    assert torch.equal(lab.port.model.get_buffer(NAME), before)
    assert "{" not in computed_buffers.SAYS[Result.GOOD].say(found.numbers)


def test_fresh_weights_take_what_the_configuration_gives_as_whoever_loads_them_will() -> None:
    assert made(run_with(0.0), "computed_buffers")[0].result is Result.GOOD


def test_frequencies_that_were_changed_on_purpose_and_trained_with_stay() -> None:
    model = tiny_llama(0, hidden=32, layers=1, heads=2, kv_heads=2, mlp=32, vocab=VOCAB, positions=64)
    model.model.rotary_emb.inv_freq.mul_(0.0)
    port = HalfPort(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-2), causal_loss, text(TRAINED + 2))
    lab = trained(TRAINED, Trigger.SILENT, port=port)
    found, _ = made(lab, "computed_buffers")
    assert (found.result, found.numbers["loss"] > found.numbers["was"]) == (Result.BAD, True)
    assert "{" not in computed_buffers.SAYS[Result.BAD].say(found.numbers)


def test_a_sound_model_costs_nothing() -> None:
    lab = run_with(1.0)
    assert made(lab, "computed_buffers")[0].result is Result.NOT_RUN
    assert lab.budget.replays == 0
