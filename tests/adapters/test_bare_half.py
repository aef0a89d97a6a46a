"""A tiny Llama in a guarded bare loop: an overflow of half precision, and a rate that is far too high."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import finitune
from finitune.models.tiny import tiny_llama
from finitune.numerics.half import emulated_half

Batch = dict[str, Tensor]


def llama() -> nn.Module:
    return tiny_llama(0, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=64, positions=64).train()


def text(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    out = []
    for _ in range(count):
        starts_B1 = torch.randint(0, 60, (4, 1), generator=generator)
        strides_B1 = torch.randint(1, 4, (4, 1), generator=generator)
        ids_BT = (starts_B1 + strides_B1 * torch.arange(16)) % 60
        out.append({"input_ids": ids_BT, "labels": ids_BT.clone()})
    return out


def plain(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def half(model: Any, batch: Batch) -> Tensor:
    with emulated_half(torch.float16):
        loss: Tensor = model(**batch).loss
    return loss


def is_finite(guard: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for _, t in guard.port.state_tensors())


def test_a_module_that_overflows_in_fp16_becomes_an_island_of_fp32() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with finitune.guard(model, optimizer, half) as guard:
        steps = text(10)
        for batch in steps[:6]:
            guard.step(batch)
        with torch.no_grad():
            weight = model.get_submodule("model.layers.1.mlp.down_proj").weight
            weight[0] = 3e4 * torch.sign(weight[0])
            model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(30)
        outcomes = [guard.step(batch) for batch in steps[6:]]
        assert guard.port.facts()["precision"] == "fp16-emulated"
        assert guard.port.conditions.fp32_modules, guard.incidents
        assert is_finite(guard)
        assert all(o.committed for o in outcomes[1:])
    assert guard.incidents[0].diagnosis.code == "NUM400"


def test_a_rate_far_too_high_is_noticed_and_the_weights_stay_finite() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with finitune.guard(model, optimizer, plain) as guard:
        try:
            for k, batch in enumerate(text(60)):
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 if k < 25 else 5.0
                guard.step(batch)
        except finitune.Halted:
            pass
        assert is_finite(guard)
        assert guard.incidents
        assert guard.incidents[0].step <= 28
