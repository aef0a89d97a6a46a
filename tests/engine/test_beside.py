"""Looks beside the step: what they find is told with the step, and one that a strange model breaks is given up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import finitune
from finitune.core.types import Judgement, Reading, Verdict
from finitune.engine import beside
from finitune.engine.beside import Beside
from finitune.engine.step import Outcome
from finitune.models.tiny import tiny_llama


def outcome() -> Outcome:
    return Outcome(Reading(1, 2.0, 1.0), Judgement(Verdict.COMMIT, ()), ())


def guard_of(model: nn.Module, step: int = 0) -> Any:
    port = SimpleNamespace(model=model, state=SimpleNamespace(step=step, updates=0), batch=list)
    return SimpleNamespace(port=port, able=True, treatment=None)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config: Any = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    return MixtralForCausalLM(config)


def test_a_router_that_collapses_is_told_by_the_step_of_a_guarded_script_and_the_run_keeps_its_bits() -> None:
    def trained(guarded: bool) -> tuple[list[Any], Any]:
        model, found = mixtral().train(), []
        gate = model.model.layers[0].mlp.gate
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        row_D = gate.weight.detach()[2].clone()
        gate.register_forward_pre_hook(lambda _m, args: (args[0] + 20 * row_D / row_D.pow(2).sum(),))
        guard = finitune.guard(model, optimizer, lambda m, b: m(input_ids=b, labels=b).loss) if guarded else None
        for step in range(6):
            ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(step))
            if guard is not None:
                found += guard.step(ids).findings
                continue
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if guard is not None:
            guard.close()
        return found, model.state_dict()

    found, weights = trained(True)
    assert [(f.code, f.where, f.data["expert"]) for f in found] == [("MOD117", "model.layers.0.mlp.gate", 2)]
    assert all(torch.equal(t, weights[n]) for n, t in trained(False)[1].items())


@pytest.mark.parametrize("broken", ["begin", "end"])
def test_a_look_that_fails_is_given_up_and_costs_nothing(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    guard = guard_of(mixtral())
    looks = Beside(guard.port)

    def fails(*_: Any) -> None:
        raise TypeError("a strange model")

    monkeypatch.setattr(looks.routing, broken, fails)
    assert looks.begin(guard, None) is None  # type: ignore[arg-type]
    assert looks.end(outcome()) == outcome()
    assert looks.routing is None


def test_a_model_that_cannot_be_looked_at_has_no_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_model: nn.Module) -> None:
        raise NotImplementedError("a sharded tensor")

    monkeypatch.setattr(beside, "repairs", fails)
    guard = guard_of(tiny_llama(0))
    assert Beside(guard.port).begin(guard, None) is None  # type: ignore[arg-type]


def test_closed_it_looks_at_nothing() -> None:
    model = tiny_llama(0)
    model.model.rotary_emb.inv_freq.zero_()
    guard = guard_of(model)
    guard.treatment = object()
    looks = Beside(guard.port)
    looks.close()
    assert looks.begin(guard, None) is None  # type: ignore[arg-type]
    assert looks.end(outcome()) == outcome()
