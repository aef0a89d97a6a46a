"""Faults of range: forward overflow (B), loss scale (C), half weights (D)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import finitune
from finitune.engine.policy import Action
from finitune.models.tiny import tiny_llama
from incidents import planted
from support.incidents import PORTS, bare, ours, shows, summary, suspects, tell

RANGE = ("fp32_modules", "bf16", "fp32")
NEVER = ("DAT", "OPT401", "OPT406", "MOD", "SYS")


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("layer", [0, 1])
def test_an_mlp_beyond_fp16_is_named_and_computed_in_fp32(tmp_path: Path, port: str, layer: int) -> None:
    story = tell(port, tmp_path, planted.grown_mlp(layer), "precision=fp16-emulated", half=True, steps=6)
    found = shows(story, "NUM400", remedies=RANGE, never=NEVER, never_cure=("lower_lr", "clip", "skip_rows"))
    assert found.step == 1, summary(found)
    places = [*suspects(found, "module"), *suspects(found, "op"), found.diagnosis.top.where]
    assert any(f"layers.{layer}.mlp" in p for p in places), summary(found)
    assert not story.stopped


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_token_that_overflows_is_named_and_its_row_is_kept(tmp_path: Path, port: str, seed: int) -> None:
    [(step, row)] = planted.places(seed)
    fault = planted.loud_token(step, row)
    story = tell(port, tmp_path, fault, "precision=fp16-emulated", "learning_rate=1e-4", half=True, lr=1e-4)
    found = shows(story, "NUM400", remedies=RANGE, never=NEVER, never_cure=("lower_lr", "clip", "skip_rows"))
    assert "layers.0.mlp" in found.diagnosis.top.where, summary(found)
    assert suspects(found, "row"), summary(found)
    # One module is enough, on a port that computes its backward pass inside of the half region as well.
    assert found.remedy == "fp32_modules", summary(found)
    [islands] = [e for e in found.evidence if e.experiment == "islands"]
    assert islands.numbers["modules"] == ["model.layers.0.mlp"], summary(found)
    assert not story.stopped


def test_a_scale_that_searches_its_level_is_no_incident(tmp_path: Path) -> None:
    story = ours(tmp_path, lambda _rig: None, "precision=fp16-emulated", "scaler.init_scale=1048576", steps=8)
    assert Action.RETRY_SMALLER_SCALE in [a for _, a in story.actions]
    assert sorted(story.losses) == list(range(1, 9))
    assert story.incidents == []
    assert not story.poisoned


def test_a_scale_that_searches_its_level_is_no_incident_in_a_bare_loop() -> None:
    model = tiny_llama(0, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)

    def loss_fn(of, batch):
        with torch.autocast("cpu", torch.float16):
            return of(**batch, use_cache=False).loss

    from support.incidents import text

    with finitune.guard(model, optimizer, loss_fn, scaler=scaler, max_grad_norm=1.0) as guard:
        outcomes = [guard.step(batch) for batch in text(20)]
        assert not outcomes[0].committed
        assert outcomes[-1].committed
        assert guard.incidents == []


def test_a_floor_of_the_scale_that_is_too_high_is_named(tmp_path: Path) -> None:
    story = ours(
        tmp_path,
        lambda _rig: None,
        "precision=fp16-emulated",
        "scaler.init_scale=4194304",
        "scaler.min_scale=4194304",
        steps=6,
    )
    shows(story, "NUM401", remedies=("scaler_reset", *RANGE), never=NEVER)
    assert not story.stopped


@pytest.mark.parametrize("bits", [28, 31])
def test_gradients_beyond_the_floor_of_the_scale_are_named_in_a_bare_loop(bits: int) -> None:
    """A loss of another unit: at the floor of 2^-4 its gradients still pass 65504, at 2^-12 they do not."""
    model = tiny_llama(0, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    def loss_fn(of, batch):
        with torch.autocast("cpu", torch.float16):
            return of(**batch, use_cache=False).loss * 2.0**bits

    from support.incidents import text

    with finitune.guard(model, optimizer, loss_fn, scaler=scaler, max_grad_norm=1.0) as guard:
        outcomes = [guard.step(batch) for batch in text(14)]
        incidents = guard.incidents
    found = incidents[0]
    assert (found.trigger.value, found.diagnosis.code) == ("scale", "NUM401"), summary(found)
    [scales] = [e for e in found.evidence if e.experiment == "loss_scales"]
    assert 2.0**-16 <= scales.numbers["good_at"][-1] < 2.0**-4, summary(found)
    # All gradients are of this size: a scale that suits them, and a floor below it, is all that is needed.
    assert (found.remedy, found.step, found.steps_lost) == ("scaler_reset", 2, 1), summary(found)
    assert all(o.committed for o in outcomes[1:])
    assert scaler.get_scale() == scales.numbers["scale"]
    assert {float(s["step"]) for s in optimizer.state.values()} == {14.0}
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("foreach", [True, False])
def test_fp16_weights_with_a_small_eps_are_named(foreach: bool) -> None:
    model = tiny_llama(0, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64).half()
    story = bare(
        lambda _rig: None,
        model=model,
        optimizer=lambda m: torch.optim.AdamW(m.parameters(), 1e-3, eps=1e-8, foreach=foreach),
        steps=6,
    )
    found = shows(story, "OPT400", remedies=("adam_eps", "fp32", "bf16"), never=("DAT", "OPT401", "MOD", "NUM"))
    assert found.trigger.value == "update", summary(found)
    assert found.step <= 2
    assert not story.stopped
