"""Conditions on our own port: in force from the next computation, part of the state, gone without a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finitune.engine.conditions import AS_CONFIGURED, Conditions, NotPossible
from finitune.engine.port import Ask
from finitune.engine.snapshot import as_snapshot
from finitune.numerics.digest import digest
from finitune.train.prepare import Prepared
from finitune.train.step import TrainPort
from support.ports import DOWN, at_start, bits, grads, look, prepared_runs, step
from support.runs import ready
from support.timelines import SMALL


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    return prepared_runs(tmp_path_factory.mktemp("ports"))


@pytest.fixture(params=["padded", "packed"])
def port(made: dict[str, Prepared], request: pytest.FixtureRequest) -> Iterator[TrainPort]:
    yield from at_start(made[request.param].port)


@pytest.fixture
def half(made: dict[str, Prepared]) -> Iterator[TrainPort]:
    yield from at_start(made["half"].port)


@pytest.fixture
def padded(made: dict[str, Prepared]) -> Iterator[TrainPort]:
    yield from at_start(made["padded"].port)


def test_conditions_are_saved_and_come_back_with_the_state(half: TrainPort) -> None:
    start = as_snapshot(half)
    wanted = Conditions(lr_factor=0.5, fp32_modules=(DOWN,), adam_eps=1e-4, quarantine=("abc",))
    half.adopt(wanted)
    taken = as_snapshot(half)
    assert Conditions.from_json(taken.record["conditions"]) == wanted
    start.restore(half)
    assert half.conditions == AS_CONFIGURED
    assert {g["eps"] for g in half.optimizer.param_groups} == {1e-8}
    taken.restore(half)
    assert half.conditions == wanted
    assert {g["eps"] for g in half.optimizer.param_groups} == {1e-4}


def test_a_state_that_does_not_fit_leaves_the_conditions_too(half: TrainPort) -> None:
    half.adopt(Conditions(lr_factor=0.5))
    before = bits(half)
    other = as_snapshot(half)
    other.record["conditions"] = {"adam_eps": 1e-3}
    name = next(iter(other.tensors))
    with pytest.raises(ValueError, match="expected"):
        half.restore({**other.tensors, name: torch.zeros(3)}, other.record)
    assert bits(half) == before
    assert {g["eps"] for g in half.optimizer.param_groups} == {1e-8}
    with pytest.raises(NotPossible):
        half.restore(other.tensors, {**other.record, "conditions": {"fp32_modules": ["no.such"]}})
    assert bits(half) == before


@pytest.mark.parametrize(
    "wanted",
    [{"precision": "fp8"}, {"fp32_modules": ("no.such.module",)}, {"clipper": "no-such"}, {"attention": "magic"}],
    ids=str,
)
def test_what_cannot_be_is_refused_with_nothing_changed(half: TrainPort, wanted: dict[str, Any]) -> None:
    half.adopt(Conditions(lr_factor=0.5))
    before, truth = bits(half), look(half)
    with pytest.raises(NotPossible):
        half.adopt(Conditions(**wanted))
    assert bits(half) == before
    assert look(half) == truth


def test_fp32_in_a_half_run_is_what_an_fp32_run_computes(made: dict[str, Prepared], half: TrainPort) -> None:
    plain = made["padded"].port
    truth = look(plain)
    in_half = look(half)
    assert in_half.loss != truth.loss
    half.adopt(Conditions(precision="fp32"))
    found = look(half)
    assert (found.loss, found.grad_norm) == (truth.loss, truth.grad_norm)
    assert (found.loss_scale, found.headroom_bits) == (None, None)
    assert not half.scale_left
    half.adopt(Conditions(precision="bf16"))
    assert look(half).loss not in (truth.loss, in_half.loss)
    assert half.facts()["precision"] == "bf16-emulated"
    half.adopt(AS_CONFIGURED)
    assert look(half) == in_half


@pytest.mark.parametrize("overrides", [(), ("gradient_checkpointing=true",)], ids=["plain", "checkpointing"])
def test_an_island_computes_in_fp32_also_when_it_is_computed_again(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    port = ready(tmp_path, "precision=fp16-emulated", *overrides, model=SMALL).port
    in_half = look(port)
    assert any(n.startswith(DOWN) for n in in_half.amax)
    port.adopt(Conditions(fp32_modules=(DOWN,)))
    found = look(port)
    assert found.loss != in_half.loss
    assert not any(n.startswith(DOWN) for n in found.amax), "no limit of half precision is near there"
    port.adopt(Conditions(precision="fp32"))
    assert math.isfinite(look(port).grad_norm)
    port.adopt(AS_CONFIGURED)
    assert look(port) == in_half


def test_half_weights_are_cast_for_as_long_as_it_holds(made: dict[str, Prepared]) -> None:
    for port in at_start(made["pure"].port):
        step(port)
        before, start = bits(port), as_snapshot(port)
        port.adopt(Conditions(precision="fp32"))
        assert port.facts()["weights"] == ["float32"]
        step(port)
        wide = as_snapshot(port)
        assert {t.dtype for t in wide.tensors.values()} == {torch.float32}
        start.restore(port)
        assert bits(port) == before
        wide.restore(port)
        assert digest(port.state_tensors(), port.state_record()) == digest(wide.tensors.items(), wide.record)


def test_the_rate_the_clipping_and_the_eps_are_those_of_the_conditions(padded: TrainPort) -> None:
    configured = padded.lr
    padded.adopt(Conditions(lr_factor=0.5, max_grad_norm=1e-3, adam_eps=1e-2))
    assert padded.lr == configured / 2
    assert padded.facts()["max_grad_norm"] == 1e-3
    assert padded.facts()["adam_eps"] == 1e-2
    padded.adopt(Conditions(max_grad_norm=100.0))
    assert padded.max_grad_norm == 1.0, "the tighter one holds"


def test_a_fixed_loss_scale_and_a_floor(half: TrainPort) -> None:
    plain = look(half)
    half.adopt(Conditions(loss_scale=256.0))
    found = look(half)
    assert found.loss_scale == 256.0
    assert found.loss == plain.loss
    assert not half.scale_left
    scaler = half.state.scaler
    assert scaler is not None
    half.adopt(AS_CONFIGURED)
    scaler.scale = 2.0
    half.adopt(Conditions(min_scale=64.0))
    assert look(half).loss_scale == 64.0
    assert not half.scale_left
    half.adopt(AS_CONFIGURED)
    assert look(half).loss_scale == 2.0
    half.adopt(Conditions(min_scale=64.0))
    step(half)
    assert scaler.scale == 64.0
    scaler.scale = 2.0**60
    half.adopt(Conditions(max_scale=256.0))
    assert look(half).loss_scale == 256.0
    half.adopt(AS_CONFIGURED)
    assert look(half).loss_scale == 2.0**60
    half.adopt(Conditions(max_scale=256.0))
    step(half)
    half.adopt(AS_CONFIGURED)
    assert look(half).loss_scale == 256.0


@pytest.mark.parametrize("name", ["zclip", "autoclip", "adagc"])
def test_what_a_clipper_remembers_is_part_of_the_state(padded: TrainPort, name: str) -> None:
    padded.adopt(Conditions(clipper=name))
    for _ in range(3):
        step(padded)
    middle = as_snapshot(padded)
    assert middle.record["clipper"]["name"] == name
    for _ in range(3):
        step(padded)
    truth = bits(padded)
    middle.restore(padded)
    for _ in range(3):
        step(padded)
    assert bits(padded) == truth
    memory = padded.state.clipper
    padded.adopt(AS_CONFIGURED)
    padded.adopt(Conditions(clipper=name))
    assert padded.state.clipper is memory, "a look under other conditions leaves it alone"


def test_quarantined_rows_are_not_computed_and_an_empty_step_trains_nothing(padded: TrainPort) -> None:
    rows = padded.rows()
    alone = grads(padded, Ask())
    padded.adopt(Conditions(quarantine=(rows[0].digest,)))
    assert padded.rows() == tuple(r for r in rows if r.digest != rows[0].digest)
    assert padded.forward_backward().rows == padded.rows()
    padded.abort()
    assert any(not torch.equal(g, alone[n]) for n, g in grads(padded, Ask()).items())
    padded.adopt(Conditions(quarantine=tuple(r.digest for r in rows)))
    empty = look(padded)
    assert (empty.supervised_tokens, empty.tokens, empty.loss, empty.grad_norm) == (0, 0, 0.0, 0.0)
    assert padded.rows() == ()
    assert padded.units() == ()
    assert padded.facts()["width_tokens"] == 0
