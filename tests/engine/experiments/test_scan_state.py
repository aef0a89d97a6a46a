"""The scan of the state finds bad weights, moments and buffers, and dates them."""

from __future__ import annotations

import pytest
import torch

from finitune.core.incident import Result
from finitune.engine.experiments import scan_state
from finitune.engine.snapshot import Snapshot
from support.replay_port import lab_of, train
from support.tiny_ports import llama_port

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def test_a_healthy_state_is_good_and_its_largest_number_is_told() -> None:
    port = llama_port()
    train(port, 1)
    lab = lab_of(port)
    evidence, suspects = scan_state.run(lab, lab.case)
    assert evidence.result is Result.GOOD
    assert suspects == ()
    assert evidence.numbers["largest"] >= 1.0
    assert evidence.numbers["parameters"] == evidence.numbers["moments"] == evidence.numbers["buffers"] == []
    assert evidence.replays == 0
    assert "{" not in scan_state.SAYS[Result.GOOD].say(evidence.numbers)


def test_the_step_that_made_a_weight_bad_is_found() -> None:
    port = llama_port(steps=10)
    states: dict[int, Snapshot] = {}
    train(port, 8, states)
    for tensors in (*(states[step].tensors for step in (6, 7, 8)), dict(port.state_tensors())):
        with torch.no_grad():
            tensors[WEIGHT][3, 7] = float("inf")
    lab = lab_of(port, states=states)
    evidence, suspects = scan_state.run(lab, lab.case)
    assert evidence.result is Result.BAD
    suspect = next(s for s in suspects if s.name == WEIGHT)
    assert suspect.kind == "parameter"
    assert suspect.data["index"] == [3, 7]
    assert (suspect.data["row"], suspect.data["column"]) == (3, 7)
    assert suspect.data["value"] == float("inf")
    assert suspect.data["shape"] == [32, 64]
    assert suspect.data["since_step"] == 6
    assert suspect.data["since_exact"]
    assert "{" not in scan_state.SAYS[Result.BAD].say(evidence.numbers)


@pytest.mark.parametrize(("slot", "value"), [("exp_avg", float("nan")), ("exp_avg_sq", -1e-12)])
def test_a_bad_moment_is_named(slot: str, value: float) -> None:
    port = llama_port()
    train(port, 1)
    port.optimizer.state[dict(port.parameters())[WEIGHT]][slot][0, 2] = value
    lab = lab_of(port)
    evidence, suspects = scan_state.run(lab, lab.case)
    assert evidence.numbers["moments"] == [f"{WEIGHT}|{slot}"]
    assert suspects[0].kind == "moment"
    assert suspects[0].data["index"] == [0, 2]
    assert suspects[0].data["num_bad"] == 1


def test_a_frozen_weight_and_a_buffer_count_as_well() -> None:
    port = llama_port()
    frozen = port.model.model.norm.weight.requires_grad_(False)
    rope = port.model.model.rotary_emb.inv_freq
    with torch.no_grad():
        frozen[1] = float("nan")
        rope[0] = float("inf")
    lab = lab_of(port)
    evidence, suspects = scan_state.run(lab, lab.case)
    assert evidence.numbers["parameters"] == ["model.norm.weight"]
    assert evidence.numbers["buffers"][0] == "model.rotary_emb.inv_freq"
    assert suspects[0].data["frozen"]
    assert suspects[0].data["since_step"] is None


def test_a_tensor_bad_from_the_start_has_no_first_step() -> None:
    port = llama_port(steps=5)
    with torch.no_grad():
        port.model.model.embed_tokens.weight[5] = float("inf")
    port.batches[3][0]["input_ids"][0, 0] = 5
    for step in range(3):
        port.batches[step][0]["input_ids"][port.batches[step][0]["input_ids"] == 5] = 6
    states: dict[int, Snapshot] = {}
    train(port, 3, states)
    lab = lab_of(port, states=states)
    _, suspects = scan_state.run(lab, lab.case)
    assert suspects[0].name == "model.embed_tokens.weight"
    assert suspects[0].data["since_step"] is None
    assert suspects[0].data["since_exact"]
