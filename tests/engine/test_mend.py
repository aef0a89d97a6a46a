"""Repair copies good values over bad ones; the row of the padding token may become 0, no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finitune.core.incident import Trigger
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments import scan_state
from finitune.engine.mend import mend, split_row
from finitune.engine.padding_row import padding_row
from finitune.engine.plan import Mend, Operation
from finitune.engine.replay import same_again
from support.replay_port import lab_of, train
from support.tiny_ports import llama_port

EMBEDDING = "model.embed_tokens.weight"


def test_names_with_a_row() -> None:
    assert split_row("a.b[17]") == ("a.b", 17)
    assert split_row("a.b|exp_avg") == ("a.b|exp_avg", None)


def test_the_padding_row_becomes_zero_and_nothing_else_changes() -> None:
    port = llama_port()
    weight = port.model.model.embed_tokens.weight
    with torch.no_grad():
        weight[0, 3:] = float("inf")
    was = weight.detach().clone()
    mend(port, (Mend(Operation.REPAIR, (f"{EMBEDDING}[0]",)),), lambda _step: None)
    assert torch.equal(weight[0], torch.zeros_like(weight[0]))
    assert torch.equal(weight[1:], was[1:])


def test_a_tensor_without_a_good_value_is_refused() -> None:
    port = llama_port()
    for name in (EMBEDDING, "nowhere", "nowhere[3]"):
        with pytest.raises(NotPossible):
            mend(port, (Mend(Operation.REPAIR, (name,)),), lambda _step: None)


def test_only_a_padding_token_that_no_row_uses_counts() -> None:
    port = llama_port()
    weight = port.model.model.embed_tokens.weight
    port.model.config.pad_token_id = 0
    micro = port.batches[0][0]
    micro["input_ids"][micro["input_ids"] == 0] = 1
    micro["attention_mask"] = torch.ones_like(micro["input_ids"])
    assert padding_row(port, weight, [0], 1) == 0
    assert padding_row(port, weight, [1], 1) is None
    assert padding_row(port, weight, [0, 1], 2) is None
    assert padding_row(port, port.model.model.norm.weight, [0], 1) is None
    micro["input_ids"][1, 2] = 0
    assert padding_row(port, weight, [0], 1) is None
    micro["attention_mask"][1, 2] = 0
    assert padding_row(port, weight, [0], 1) == 0


def test_a_frozen_weight_is_compared_with_the_original_model() -> None:
    port = llama_port()
    norm = port.model.model.norm.weight.requires_grad_(False)
    original = norm.detach().clone()
    with torch.no_grad():
        norm[1] = float("nan")
    for value, told in ((original, (0, False)), (norm.detach().clone(), (None, True))):
        port.origin = lambda name, value=value: value if name == "model.norm.weight" else None
        _, suspects = scan_state.run(lab := lab_of(port), lab.case)
        assert (suspects[0].data.get("sound_at"), suspects[0].data["since_exact"]) == told


def test_a_moment_that_was_bad_before_the_update_is_looked_into_and_not_retried() -> None:
    from finitune.engine.investigate import held_against_the_state

    port = llama_port()
    train(port, 1)
    _, parameter = port.parameters()[3]
    for value, verdict in ((float("inf"), "reproduced"), (1.0, "not_reproduced")):
        port.optimizer.state[parameter]["exp_avg_sq"].view(-1)[2] = value
        lab = lab_of(port)
        lab.case = replace(lab.case, trigger=Trigger.UPDATE)
        found = held_against_the_state(lab, same_again(lab, lab.case))
        assert found.verdict is not None
        assert found.verdict.value == verdict
