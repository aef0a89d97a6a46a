"""Nothing is lost while a loss scale is sought because of a fault; a search that is none costs what it always does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finitune
from finitune.core.incident import Incident
from finitune.models.tiny import tiny_llama
from finitune.numerics.half import emulated_half
from support.incidents import ours, summary, text

STEPS = 26
LOUD_FROM = 7


class Times(torch.autograd.Function):
    """The identity; the gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, by: float) -> torch.Tensor:
        ctx.by = by
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * ctx.by, None


class Loop:
    """A fp16 loop with a scaler and a schedule, guarded or plain."""

    def __init__(self, init_scale: float, times: float = 1.0) -> None:
        self.model = tiny_llama(0, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1.0 / (1 + n))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        self.times, self.seen = times, 0
        self.batches = text(STEPS)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        with emulated_half(torch.float16):
            return model(**batch, use_cache=False).loss * self.times

    def guarded(self, **options: Any) -> tuple[list[Incident], Any]:
        made = {"scheduler": self.schedule, "scaler": self.scaler, "max_grad_norm": 1.0, **options}
        with finitune.guard(self.model, self.optimizer, self.loss, **made) as guard:
            for number, batch in enumerate(self.batches, 1):
                self.seen = number
                guard.step(batch)
            return guard.incidents, guard

    def plain(self) -> None:
        for batch in self.batches:
            self.scaler.scale(self.loss(self.model, batch)).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a schedule that moves before the first update
                self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)

    def loud_from(self, step: int, name: str, factor: float) -> None:
        """From a step on, gradients inside one module are so many times as large; everything outside is as ever."""
        module = self.model.get_submodule(name)
        on = lambda: self.seen >= step  # noqa: E731
        module.register_forward_pre_hook(lambda _m, args: (Times.apply(args[0], 1 / factor),) if on() else None)
        module.register_forward_hook(lambda _m, _args, out: Times.apply(out, factor) if on() else None)
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient: gradient / factor if on() else gradient)

    @property
    def updates(self) -> int:
        return int(max(float(s["step"]) for s in self.optimizer.state.values()))

    def bits(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.mark.parametrize("power", [40, 77, 100])
def test_a_start_from_an_extreme_scale_loses_no_batch(power: int) -> None:
    loop, usual = Loop(2.0**power), Loop(2.0**16)
    incidents, _ = loop.guarded()
    usual.plain()
    [found] = incidents
    assert (found.step, found.diagnosis.code, found.remedy) == (1, "NUM401", "scaler_reset"), summary(found)
    assert loop.updates == STEPS
    assert loop.scaler.get_scale() == 2.0**16
    # As if it had begun where scalers begin: to the bit.
    assert all(torch.equal(a, b) for a, b in zip(loop.bits(), usual.bits(), strict=True))


def test_a_long_search_at_the_start_is_taken_back_to_its_first_batch() -> None:
    loop = Loop(2.0**30, times=2.0**18)
    incidents, _ = loop.guarded()
    [found] = incidents
    assert (found.step, found.steps_lost, found.remedy) == (17, 16, "scaler_reset"), summary(found)
    assert loop.updates == loop.schedule.last_epoch == STEPS


def test_a_usual_search_is_that_of_the_plain_loop() -> None:
    loop, plain = Loop(2.0**24), Loop(2.0**24)
    incidents, _ = loop.guarded()
    plain.plain()
    assert incidents == []
    assert plain.updates < STEPS
    assert loop.scaler.state_dict() == plain.scaler.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(loop.bits(), plain.bits(), strict=True))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("power", [24, 33])
def test_one_loud_module_is_named_and_the_batches_skipped_for_it_are_trained_on(name: str, power: int) -> None:
    loop = Loop(2.0**10)
    loop.loud_from(LOUD_FROM, name, 2.0**power)
    incidents, guard = loop.guarded()
    [found] = incidents
    top = found.diagnosis.top
    assert top is not None
    assert (top.code, top.where, found.remedy) == ("NUM401", name, "fp32_modules"), summary(found)
    assert (found.step, found.steps_lost) == (LOUD_FROM + 7, 7)
    assert found.replays <= 25
    [module] = guard.conditions.fp32_modules
    assert name.startswith(module)
    assert loop.updates == loop.schedule.last_epoch == STEPS
    # The scale of before holds for all the rest.
    assert loop.scaler.get_scale() == 2.0**10


def test_gradients_that_all_become_loud_get_a_smaller_scale() -> None:
    loop = Loop(2.0**16)
    head = loop.model.get_submodule("lm_head")
    head.register_forward_hook(lambda _m, _args, out: Times.apply(out, 2.0**14) if loop.seen >= LOUD_FROM else None)
    incidents, _ = loop.guarded()
    [found] = incidents
    assert (found.diagnosis.code, found.remedy) == ("NUM401", "scaler_reset"), summary(found)
    assert loop.updates == STEPS


def test_where_no_cure_holds_the_scaler_goes_on_and_it_is_told_once() -> None:
    """From a step on the loss has another unit, so that no plan comes back to the losses of before."""
    loop = Loop(2.0**16)
    plain = loop.loss

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        loop.times = 2.0**14 if loop.seen >= LOUD_FROM else 1.0
        return plain(model, batch)

    loop.loss = loss  # type: ignore[method-assign]
    incidents, _ = loop.guarded()
    first = incidents[0]
    assert (first.trigger.value, first.outcome) == ("scale", "observed"), summary(first)
    assert [i.trigger.value for i in incidents].count("scale") == 1


def test_whoever_only_observes_keeps_the_plain_loops_course() -> None:
    loop = Loop(2.0**10)
    loop.loud_from(LOUD_FROM, "model.layers.1.mlp.down_proj", 2.0**18)
    incidents, _ = loop.guarded(policy="observe")
    assert [i.outcome for i in incidents] == ["observed"]
    assert loop.updates < STEPS


def test_our_own_trainer_takes_the_scale_that_fits(tmp_path: Path) -> None:
    story = ours(tmp_path, lambda _rig: None, "precision=fp16-emulated", f"scaler.init_scale={2.0**40}", steps=6)
    [found] = story.incidents
    assert (found.step, found.diagnosis.code, found.remedy) == (1, "NUM401", "scaler_reset"), summary(found)
    assert sorted(story.losses) == list(range(1, 7))
    assert not story.stopped
