"""What a loop may do wrong: each is told clearly, and the run is unharmed."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.core.errors import Halted, UserError, UserErrors
from finitune.engine.port import Capability
from finitune.numerics.fingerprint import fingerprint

Batch = dict[str, Any]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 1))


def mse(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = ((model(batch["x"]) - batch["y"]) ** 2).mean()
    return loss


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 3, generator=generator)
    return [{"x": x[i], "y": x[i].sum(dim=1, keepdim=True)} for i in range(count)]


def guarded(loss_fn: Any = mse, model: nn.Module | None = None, **options: Any) -> Any:
    model = net() if model is None else model
    return finitune.guard(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loss_fn, **options)


def digest(port: Any) -> str:
    return fingerprint(port.state_tensors(), port.state_record()).digest


@pytest.mark.parametrize(
    "broken",
    [
        lambda m, b: mse(m, b).item(),
        lambda m, b: mse(m, b).detach(),
        lambda m, b: m(b["x"]),
        lambda m, b: None,
        lambda m, b: SimpleNamespace(loss=None),
    ],
    ids=["number", "detached", "not scalar", "nothing", "no loss in it"],
)
def test_what_is_no_loss_is_refused_and_the_run_goes_on(broken: Any) -> None:
    use: list[Any] = [mse]
    guard = guarded(lambda m, b: use[0](m, b))
    data = batches(3)
    guard.step(data[0])
    before, generators = digest(guard.port), torch.get_rng_state()
    use[0] = broken
    with pytest.raises(UserError, match="SYS420"):
        guard.step(data[1])
    assert digest(guard.port) == before
    assert torch.equal(torch.get_rng_state(), generators)
    assert all(p.grad is None for p in guard.port.model.parameters())
    use[0] = mse
    assert guard.step(data[1]).committed
    assert guard.step(data[2]).reading.step == 3


def test_an_exception_of_the_loss_function_reaches_the_loop_and_costs_nothing() -> None:
    fail = [False]

    def moody(model: nn.Module, batch: Batch) -> Tensor:
        loss = mse(model, batch)
        if fail[0]:
            raise ZeroDivisionError("planted")
        return loss

    guard, plain = guarded(moody), guarded()
    data = batches(4)
    torch.manual_seed(4)
    for batch in data:
        fail[0] = True
        with pytest.raises(ZeroDivisionError, match="planted"):
            guard.step(batch)
        fail[0] = False
        assert guard.step(batch).committed
    torch.manual_seed(4)
    for batch in data:
        plain.step(batch)
    assert digest(guard.port) == digest(plain.port)


def test_a_loss_in_an_object_or_a_mapping_is_found() -> None:
    for wrap in (lambda x: SimpleNamespace(loss=x, logits=None), lambda x: {"loss": x}, lambda x: x.reshape(1)):
        assert guarded(lambda m, b, w=wrap: w(mse(m, b))).step(batches(1)[0]).committed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"policy": "yolo"}, "yolo"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"watch": ["nobody"]}, "nobody"),
        ({"scaler": object()}, "scaler"),
        ({"scheduler": object()}, "scheduler|SYS424|step"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(options: dict[str, Any], told: str) -> None:
    with pytest.raises((UserError, UserErrors), match=told):
        guarded(**options)


def test_optimizers_that_cannot_be_guarded_are_refused() -> None:
    model = net()
    for optimizer, told in (
        (torch.optim.LBFGS(model.parameters()), "LBFGS"),
        (SimpleNamespace(step=print), "SimpleNamespace"),
    ):
        with pytest.raises((UserError, UserErrors), match=told):
            finitune.guard(model, optimizer, mse)
    model.requires_grad_(False)
    with pytest.raises((UserError, UserErrors)):
        finitune.guard(model, torch.optim.SGD(model.parameters(), lr=0.1), mse)


def test_parameters_outside_of_the_model_are_guarded_under_names_of_their_own() -> None:
    model, head = net(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    guard = finitune.guard(model, optimizer, lambda m, b: (head(m(b["x"])) ** 2).mean())
    assert guard.step(batches(1)[0]).committed
    names = [n for n, _ in guard.port.state_tensors()]
    assert len(names) == len(set(names)) == 2 * len([*model.parameters(), *head.parameters()])
    assert head.weight.grad is None


def test_a_scheduler_that_needs_a_metric_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises((UserError, UserErrors), match="ReduceLROnPlateau"):
        finitune.guard(model, optimizer, mse, plateau)


def test_half_weights_with_a_scaler_are_refused_where_nothing_may_be_changed() -> None:
    model = net().half()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises((UserError, UserErrors), match="fp16") as refused:
        finitune.guard(model, torch.optim.SGD(model.parameters(), lr=0.1), mse, scaler=scaler, policy="observe")
    assert refused.value.data["parameters"] == [n for n, _ in model.named_parameters()]
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def in_place(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        model[0].bias.add_(1e-3)
    return mse(model, batch)


def behind_the_back(model: Any, batch: Batch) -> Tensor:
    model[0].bias.data.add_(1e-3)
    return mse(model, batch)


@pytest.mark.parametrize("loss_fn", [in_place, behind_the_back])
def test_a_loss_function_that_changes_weights_is_seen_and_replay_withdrawn(loss_fn: Any) -> None:
    guard = guarded(loss_fn)
    data = batches(3)
    codes = [f.code for f in guard.step(data[0]).findings]
    if "SYS427" not in codes:  # what goes around the tensors' own count is found at the first replay
        guard.port.push(data[1])
        for _ in range(2):
            guard.port.forward_backward()
            guard.port.abort()
        codes = [f.code for f in guard.port.findings]
    assert "SYS427" in codes
    assert Capability.REPLAY not in guard.port.capabilities()
    assert guard.step(data[2]).committed


def test_a_batch_with_foreign_objects_trains_and_a_failure_in_it_is_refused() -> None:
    class Thing:
        pass

    guard = guarded(lambda m, b: mse(m, b) * b.get("weight", 1.0))
    data = batches(14)
    for batch in data[:12]:
        assert guard.step({**batch, "thing": Thing()}).committed
    before = {n: p.clone() for n, p in guard.port.model.named_parameters()}
    bad = {**data[12], "thing": Thing(), "weight": float("nan")}
    with suppress(Halted):
        assert not guard.step(bad).committed
    for name, parameter in guard.port.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_frozen_unused_and_tied_parameters_are_no_trouble() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.frozen, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.frozen(self.a(x))).sum(dim=1, keepdim=True)
            return out

    torch.manual_seed(0)
    guard = guarded(model=Odd(), max_grad_norm=1.0)
    assert all(guard.step(b).committed for b in batches(4))
    assert {n for n, _ in guard.port.parameters()} >= {"a.weight", "a.bias", "unused.weight"}
    assert not any(n.startswith("frozen") for n, _ in guard.port.parameters())


def test_after_close_nothing_is_left_behind_and_nothing_goes_on() -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 1)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Layered()
    with guarded(model=model) as guard:
        guard.step(batches(1)[0])
        assert any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(UserError, match="SYS429"):
        guard.step(batches(1)[0])
    guard.close()


def test_an_empty_list_is_no_step() -> None:
    guard = guarded()
    with pytest.raises(UserError, match="SYS429"):
        guard.step([])
    assert guard.step(batches(1)[0]).committed


def test_under_no_grad_a_step_trains_all_the_same() -> None:
    guard, plain = guarded(), guarded()
    (batch,) = batches(1)
    torch.manual_seed(3)
    with torch.no_grad():
        guard.step(batch)
    torch.manual_seed(3)
    plain.step(batch)
    assert digest(guard.port) == digest(plain.port)
