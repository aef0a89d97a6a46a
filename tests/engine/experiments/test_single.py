"""Each experiment on a fault that is planted for it, and on one that it must not blame."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.experiments.port import HalfPort, causal_loss, llama, text
from engine.experiments.zoo import half_optimizer, infinite_derivative, lab_at, overflow, until_failure
from finitune.core import registry
from finitune.core.incident import Evidence, Result, Suspect, Trigger
from finitune.engine.experimenting import perform
from finitune.engine.experiments import islands
from finitune.engine.experiments._formulas import formula_of
from finitune.engine.lab import Lab
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.snapshot import as_snapshot


def made(lab: Lab, name: str) -> tuple[Evidence, tuple[Suspect, ...]]:
    lab.budget.max_replays = math.inf
    return perform(lab, lab.case, name, registry.load("experiments", name))


def result(lab: Lab, name: str) -> Result:
    return made(lab, name)[0].result


def trained(steps: int = 10, trigger: Trigger = Trigger.OUTLIER, *, port: HalfPort | None = None, **data: Any) -> Lab:
    """A sound run, stopped after some steps."""
    if port is None:
        model = llama()
        port = HalfPort(model, torch.optim.AdamW(model.parameters(), lr=1e-3), causal_loss, text(30))
    states, losses, norms = {0: as_snapshot(port)}, [], []
    for _ in range(steps):
        reading = read(port.forward_backward())
        port.commit(reading)
        port.settle(Action.PROCEED, reading, clean=True)
        losses.append(reading.loss)
        norms.append(reading.grad_norm)
        states[port.state.step] = as_snapshot(port)
    if trigger is not Trigger.RUNAWAY:
        reading = read(port.forward_backward())
        port.abort()
    return lab_at(port, trigger, reading, states, losses, norms, **data)


# -- supervised tokens, loss scales -----------------------------------------------------------------------------------


def test_labels_are_counted_where_the_trainer_does_not_count() -> None:
    lab = trained()
    assert made(lab, "supervised_tokens")[0].numbers["supervised"] == 4 * 16
    lab.port.batch()[0]["labels"].fill_(-100)
    assert result(lab, "supervised_tokens") is Result.BAD


def test_a_trainer_that_counts_none_is_believed() -> None:
    lab = trained()
    lab.case = replace(lab.case, reading=replace(lab.case.reading, supervised_tokens=0, tokens=9))
    numbers = made(lab, "supervised_tokens")[0].numbers
    assert (numbers["supervised"], numbers["tokens"]) == (0, 9)


def test_a_nan_gradient_is_bad_at_the_smallest_scale_and_larger_ones_are_not_tried() -> None:
    lab = infinite_derivative()
    lab.port.scale = 2.0**16  # type: ignore[attr-defined]
    lab.case = replace(lab.case, reading=replace(lab.case.reading, loss_scale=2.0**16))
    found, _ = made(lab, "loss_scales")
    assert (found.result, found.replays) == (Result.BAD, 1.0)


def test_without_a_scale_there_is_nothing_to_try() -> None:
    assert result(infinite_derivative(), "loss_scales") is Result.NOT_RUN


# -- attention and padding ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused attention whose backward is NaN at lengths that are a multiple of 8."""
    real = F.scaled_dot_product_attention

    def broken(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(query, *args, **kwargs)
        if query.shape[-2] % 8 == 0 and out.requires_grad:
            out.register_hook(lambda grad: grad * math.nan)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)


def padded(num_steps: int) -> list[list[dict[str, torch.Tensor]]]:
    batches = text(num_steps)
    for (batch,) in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, -2:] = 0
        batch["labels"][:, -2:] = -100
    return batches


@pytest.mark.usefixtures("broken_kernel")
def test_a_kernel_that_fails_at_a_length_is_good_in_plain_attention_and_at_other_widths() -> None:
    model = llama()
    lab = until_failure(HalfPort(model, torch.optim.SGD(model.parameters(), lr=0.1), causal_loss, padded(3)))
    assert lab.case.trigger is Trigger.GRADIENT
    assert result(lab, "math_attention") is Result.GOOD
    found, _ = made(lab, "padding")
    assert found.result is Result.GOOD
    assert (found.numbers["widths_good"], found.numbers["widths_bad"]) == ([1, -1], [8])


def test_a_nan_in_the_loss_stays_under_plain_attention_and_any_width() -> None:
    lab = infinite_derivative()
    assert result(lab, "math_attention") is Result.BAD
    assert result(lab, "padding") is Result.NOT_RUN, "the span has the width, and nobody knows how to pad it"


# -- islands ---------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """x + tiny * mlp(x); with ``size`` large the product passes 65504."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8, bias=False)
        self.mlp = nn.Linear(8, 8, bias=False)
        self.size = size
        with torch.no_grad():
            self.attn.weight.copy_(torch.eye(8))
            self.mlp.weight.copy_(torch.eye(8) * size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.01 * self.attn(x).float() + self.mlp(x).float() / (self.size * 100)


class _Stack(nn.Module):
    def __init__(self, num: int, *hot: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(1e4 if i in hot else 1.0) for i in range(num))
        self.head = nn.Linear(8, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack_lab(num: int, *hot: int) -> Lab:
    model = _Stack(num, *hot)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = [[{"x": torch.full((2, 8), 20.0)}]]
    return until_failure(HalfPort(model, optimizer, lambda m, b: m(b["x"]).float().mean(), batches, half=True))


def test_two_modules_that_overflow_apart_are_both_found_and_no_more() -> None:
    found, suspects = made(stack_lab(8, 2, 5), "islands")
    assert found.result is Result.GOOD
    assert set(found.numbers["modules"]) == {"layers.2.mlp", "layers.5.mlp"}
    assert found.numbers["num_tried"] <= islands.MAX_TRIES
    assert {s.name for s in suspects} == {"layers.2.mlp", "layers.5.mlp"}


def test_with_one_of_them_localised_its_kin_are_tried_before_everything() -> None:
    lab = stack_lab(8, 2, 5)
    lab.case = lab.case.with_suspects(Suspect("module", "layers.2.mlp", {"amax": 1e5}))
    found, suspects = made(lab, "islands")
    assert set(found.numbers["modules"]) == {"layers.2.mlp", "layers.5.mlp"}
    assert next(s for s in suspects if s.name == "layers.2.mlp").data == {"amax": 1e5, "island": True}


def test_no_module_is_blamed_for_a_loss_that_is_nan_by_itself() -> None:
    found, suspects = made(infinite_derivative(), "islands")
    assert (found.result, found.numbers["modules"], suspects) == (Result.BAD, [], ())


def test_the_parts_of_a_model_are_its_blocks_children_and_what_is_in_no_block() -> None:
    parts = islands.parts_of(llama(layers=1))
    assert parts[0] == "model.embed_tokens"
    assert {"model.layers.0.self_attn", "model.layers.0.mlp", "model.norm", "lm_head"} <= set(parts)
    assert islands.parts_of(nn.Linear(2, 2)) == ()


# -- optimizer --------------------------------------------------------------------------------------------------------


def test_a_spoilt_moment_is_found_by_forgetting_it_and_by_forgetting_it_alone() -> None:
    lab = trained(5, Trigger.UPDATE)
    name = "model.layers.0.mlp.up_proj.weight"
    moment = dict(lab.port.state_tensors())[f"{name}|exp_avg"]
    moment.view(-1)[3] = math.nan
    lab.before = as_snapshot(lab.port)
    lab.case = lab.case.with_suspects(Suspect("moment", f"{name}|exp_avg", {"value": math.nan}))
    assert lab.shoot().bad
    found, _ = made(lab, "fresh_moments")
    assert found.result is Result.GOOD
    assert found.numbers["only"] == [name]


def test_fresh_moments_do_not_help_half_weights() -> None:
    found, _ = made(half_optimizer(), "fresh_moments")
    assert found.result is Result.BAD
    assert found.numbers["state_bad"]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_torchs_optimizers_agree_with_their_formulas(kind: str, steps: int) -> None:
    model = llama(layers=1)
    port = HalfPort(model, OPTIMIZERS[kind](model.parameters()), causal_loss, text(6))
    found, suspects = made(trained(steps, Trigger.UPDATE, port=port), "reference_optimizer")
    assert (found.result, suspects) == (Result.BAD, ())
    assert found.numbers["max_rel_difference"] < 1e-3


class AdamWThatForgetsBiasCorrection(torch.optim.AdamW):
    """An optimizer with a bug: its moments are right, its steps are not."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        was = [p.clone() for g in self.param_groups for p in g["params"]]
        super().step(closure)
        for old, p in zip(was, (p for g in self.param_groups for p in g["params"]), strict=True):
            p.copy_(old + 3 * (p - old))


def test_an_optimizer_with_a_wrong_formula_differs_and_its_parameter_is_named() -> None:
    model = llama(layers=1)
    port = HalfPort(model, AdamWThatForgetsBiasCorrection(model.parameters(), lr=1e-3), causal_loss, text(6))
    found, suspects = made(trained(2, Trigger.UPDATE, port=port), "reference_optimizer")
    assert found.result is Result.GOOD
    assert found.numbers["max_rel_difference"] == pytest.approx(2.0, rel=0.05)
    assert suspects[0].name == found.numbers["parameter"]


def test_half_weights_are_not_called_a_bug_for_their_rounding() -> None:
    model = llama(layers=1).bfloat16()
    port = HalfPort(model, torch.optim.AdamW(model.parameters(), lr=1e-5), causal_loss, text(6))
    assert result(trained(1, Trigger.SILENT, port=port), "reference_optimizer") is Result.BAD


def test_an_optimizer_without_a_formula_here_says_so() -> None:
    model = llama(layers=1)
    port = HalfPort(model, torch.optim.RMSprop(model.parameters(), lr=1e-3), causal_loss, text(6))
    found, _ = made(trained(1, Trigger.UPDATE, port=port), "reference_optimizer")
    assert found.result is Result.NOT_RUN
    assert "RMSprop" in found.numbers["reason"]
    assert callable(formula_of(torch.optim.SGD(model.parameters(), lr=0.1)))


@pytest.mark.parametrize(("lr", "expected"), [(1e-3, Result.GOOD), (1.0, Result.BAD)])
def test_an_update_that_moves_a_weight_by_more_than_its_norm_stands_out(lr: float, expected: Result) -> None:
    model = llama(layers=1)
    lab = trained(1, port=HalfPort(model, torch.optim.AdamW(model.parameters(), lr=lr), causal_loss, text(6)))
    found, suspects = made(lab, "update_share")
    assert found.result is expected
    assert (found.numbers["ratio"] > 0.1) is (expected is Result.BAD)
    assert bool(suspects) is (expected is Result.BAD)


def test_weights_that_start_at_zero_do_not_stand_out() -> None:
    model = llama(layers=1)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").zero_()
    port = HalfPort(model, torch.optim.AdamW(model.parameters(), lr=2e-4), causal_loss, text(6))
    assert result(trained(0, port=port), "update_share") is Result.GOOD


# -- outliers and runaways ---------------------------------------------------------------------------------------------


def weighted(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = causal_loss(model, batch) * batch["weight"].mean()
    return loss


def outlier(lr: float) -> Lab:
    """A batch whose loss and gradient are 50 times the usual."""
    model, batches = llama(), text(20)
    for number, (batch,) in enumerate(batches, start=1):
        batch["weight"] = torch.full((4,), 50.0 if number == 9 else 1.0)
    port = HalfPort(model, torch.optim.SGD(model.parameters(), lr=lr), weighted, batches)
    return trained(8, port=port, limit=8.0)


@pytest.mark.parametrize(("lr", "expected"), [(1e-3, Result.GOOD), (1.0, Result.BAD)])
def test_an_outlier_is_harmless_where_other_batches_keep_their_losses_after_it(lr: float, expected: Result) -> None:
    lab = outlier(lr)
    assert lab.shoot().bad
    known, _ = made(lab, "known_good_batch")
    assert known.result is Result.GOOD
    spent = lab.budget.replays
    lab.case = lab.case.with_evidence(known)
    found, _ = made(lab, "let_pass")
    assert found.result is expected
    assert found.numbers["before"] == known.numbers["losses"]
    assert lab.budget.replays - spent == 3


@pytest.mark.parametrize(
    ("is_signed", "recent", "expected"),
    [
        (False, [1e6], Result.BAD),
        (True, [0.1, 0.2], Result.BAD),
        (True, [], Result.BAD),
        (True, None, Result.BAD),
        (True, [math.nan, math.inf, -0.0], Result.BAD),
        (True, [0.1, 1e6, math.nan], Result.GOOD),
    ],
)
def test_a_policy_is_harmed_only_beyond_what_its_losses_have_been(
    is_signed: bool, recent: list[float] | None, expected: Result
) -> None:
    lab = outlier(1.0)
    assert lab.shoot().bad
    lab.case = replace(lab.case, past={**lab.case.past, "is_signed": is_signed, "recent_losses": recent})
    assert result(lab, "let_pass") is expected


def runaway(schedule: Callable[[int], float]) -> Lab:
    model = llama()
    port = HalfPort(model, torch.optim.AdamW(model.parameters(), lr=3e-3), causal_loss, text(60), schedule=schedule)
    return trained(32, Trigger.RUNAWAY, port=port)


def test_half_of_the_largest_rate_that_holds_is_taken() -> None:
    lab = runaway(lambda step: 1.0 if step < 22 else 300.0)
    found, _ = made(lab, "lower_lr")
    numbers = found.numbers
    assert found.result is Result.GOOD
    assert 20 <= numbers["start_step"] <= 22, "before the first update at the rate that was raised"
    assert 0.001 <= numbers["holds"] <= 0.03, "the rate of before is a 300th"
    assert numbers["factor"] == pytest.approx(numbers["holds"] / 2)
    assert numbers["came_back"]
    assert len(numbers["losses"]) == 8
    levels = {float(factor): level for factor, level in numbers["levels"].items()}
    assert len(levels) <= 4, "searched by halving"
    assert levels[numbers["holds"]] <= numbers["near"]
    assert all(level > numbers["near"] for factor, level in levels.items() if factor > numbers["holds"])


def test_a_loss_that_is_where_it_was_gives_nothing_to_prove() -> None:
    found, _ = made(runaway(lambda _step: 1.0), "lower_lr")
    assert found.result is Result.NOT_RUN
    assert "nothing to cure" in found.numbers["reason"]


def test_what_the_proof_costs_is_left_in_the_budget() -> None:
    lab = runaway(lambda step: 1.0 if step < 22 else 300.0)
    lab.budget.max_replays = 40.0
    found, _ = perform(lab, lab.case, "lower_lr", registry.load("experiments", "lower_lr"))
    assert found.result is not Result.NOT_RUN
    back = lab.before.step - found.numbers["start_step"]
    assert lab.budget.left(back + 2), lab.budget.replays


def test_an_overflow_names_the_newest_state_on_which_the_batch_is_good() -> None:
    found, suspects = made(overflow(0.2), "older_weights")
    assert found.result is Result.GOOD
    assert suspects[0].kind == "step"
    assert int(suspects[0].name) == found.numbers["newest_good"] + 1


def test_a_good_state_whose_loss_is_far_off_is_not_the_last_that_is_tried() -> None:
    lab = overflow(0.2)
    lab.case = replace(lab.case, past={**lab.case.past, "median_loss": 0.1})
    found, _ = made(lab, "older_weights")
    assert len(found.numbers["steps"]) == 2
