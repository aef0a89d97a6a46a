"""Estimates follow from sizes: more work is more, LoRA is cheaper than training all, checkpointing saves memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finitune.train.plan import Workload, available_bytes, estimate_step_s, flops_a_step, memory_bytes

WORK = Workload(
    num_parameters=1_000_000,
    num_trainable=1_000_000,
    num_body=600_000,
    num_head=400_000,
    hidden=64,
    mlp=128,
    layers=4,
    vocabulary=1000,
    micro_tokens=100,
    micro_supervised=40,
    accumulation=2,
    chunk_tokens=1024,
)


def test_a_full_step_is_six_operations_a_parameter_and_token() -> None:
    assert flops_a_step(WORK) == pytest.approx(2 * (6 * 600_000 * 100 + 6 * 400_000 * 40))


def test_lora_does_without_most_weight_gradients() -> None:
    lora = replace(WORK, num_trainable=10_000)
    assert flops_a_step(lora) / flops_a_step(WORK) == pytest.approx(4 / 6, rel=0.02)
    assert memory_bytes(lora) < memory_bytes(WORK)


def test_checkpointing_trades_time_for_memory() -> None:
    kept = replace(WORK, checkpointing=True)
    assert memory_bytes(kept) < memory_bytes(WORK)
    assert flops_a_step(kept) > flops_a_step(WORK)


def test_memory_holds_weights_gradients_and_two_moments() -> None:
    assert memory_bytes(WORK) > 4 * 4 * WORK.num_parameters


def test_the_machine_is_asked() -> None:
    device = torch.device("cpu")
    assert 0 < estimate_step_s(device, WORK) < 10
    assert available_bytes(device) > 1 << 20
