"""A tiny Llama in a guarded bare loop: half precision that overflows or is trained, and a rate that is far too high."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.core.errors import UserError
from finitune.core.journal import read
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


# -- fp16 weights under a loss scaler ---------------------------------------------------------------------------------


def half_head() -> nn.Module:
    """Everything is frozen but the last layer, which is fp16 as adapters of a half base are."""
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1.mlp" in name
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def scaled(model: nn.Module, loss_fn: Any = half, **options: Any) -> Any:
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    return finitune.guard(model, optimizer, loss_fn, scaler=torch.amp.GradScaler("cpu", init_scale=8.0), **options)


def test_trained_fp16_weights_under_a_scaler_become_fp32_with_the_same_values(tmp_path: Any) -> None:
    model, twin = half_head(), half_head()
    held = trained(model)
    with scaled(model, run_dir=tmp_path) as guard:
        assert [f.code for f in guard.findings] == ["OPT114"]
        assert all(a is b for a, b in zip(held, trained(model), strict=True))
        for a, b in zip(held, trained(twin), strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b.float())
        outcomes = [guard.step(batch) for batch in text(4)]
        assert all(o.committed for o in outcomes)
        assert is_finite(guard)
    incident = outcomes[0].incident
    assert [i.number for i in guard.incidents] == [1]
    assert guard.incidents == [incident]
    assert (incident.diagnosis.code, incident.remedy, incident.outcome) == ("OPT400", "fp32_weights", "cured")
    assert [s.name for s in incident.suspects] == [n for n, p in model.named_parameters() if p.requires_grad]
    kinds = [r["kind"] for r in read(tmp_path / "journal.jsonl")]
    assert kinds.index("finding") < kinds.index("step") < kinds.index("incident")


def test_the_raised_run_has_the_bits_of_one_whose_weights_were_fp32_from_the_start() -> None:
    raised, plain_one = half_head(), half_head()
    for parameter in trained(plain_one):
        parameter.data = parameter.data.float()
    for model in (raised, plain_one):
        with scaled(model) as guard:
            for batch in text(5):
                guard.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(raised.parameters(), plain_one.parameters(), strict=True))


def test_moments_that_are_there_already_are_raised_with_their_weights() -> None:
    model = half_head()
    optimizer = torch.optim.AdamW(trained(model), 1e-3, eps=1e-4)
    plain(model.half(), text(1)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.float()
    for parameter in trained(model):
        parameter.data = parameter.data.half()
    moments = [optimizer.state[p]["exp_avg"] for p in trained(model)]
    values = [m.clone() for m in moments]
    assert {m.dtype for m in moments} == {torch.float16}
    with finitune.guard(model, optimizer, half, scaler=torch.amp.GradScaler("cpu", init_scale=8.0)) as guard:
        for parameter, moment, value in zip(trained(model), moments, values, strict=True):
            assert optimizer.state[parameter]["exp_avg"] is moment
            assert torch.equal(moment, value.float())
        assert guard.step(text(1)[0]).committed


def test_a_model_that_cannot_be_computed_with_fp32_weights_is_as_before_and_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()  # no autocast: half and fp32 do not multiply
    model[0].requires_grad_(False)
    before = [p.clone() for p in model.parameters()]

    def loss_fn(of: Any, batch: Tensor) -> Tensor:
        loss: Tensor = of(batch).square().mean()
        return loss

    guard = scaled(model, loss_fn)
    with pytest.raises(UserError, match=r"1\.weight") as refused:
        guard.step(torch.ones(2, 4, dtype=torch.float16))
    assert refused.value.code.code == "SYS425"
    for a, b in zip(model.parameters(), before, strict=True):
        assert a.dtype == torch.float16
        assert torch.equal(a, b)


def test_fp32_weights_under_a_scaler_are_left_alone() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with finitune.guard(model, optimizer, half, scaler=torch.amp.GradScaler("cpu", init_scale=8.0)) as guard:
        guard.step(text(1)[0])
        assert guard.raised is None
        assert guard.findings == []
        assert guard.incidents == []
