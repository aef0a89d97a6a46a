"""A snapshot gives every bit back, is not changed by what comes later, and is refused where it does not fit."""

from __future__ import annotations

import pytest
import torch

from finitune.engine.snapshot import Buffers, Snapshot, as_snapshot, copy_over
from finitune.numerics.digest import digest
from finitune.numerics.fingerprint import fingerprint
from finitune.train.step import TrainPort
from support.small_port import small_port, train

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd")


def bits(port: TrainPort) -> str:
    return digest(port.state_tensors(), port.state_record())


def bits_of(snapshot: Snapshot) -> str:
    return digest(snapshot.tensors.items(), snapshot.record)


# ---------------------------------------------------------------- a snapshot gives the bits back


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restoring_gives_every_bit_back_and_training_on_gives_the_same_bits(name: str) -> None:
    port = small_port(name=name)
    train(port, 3)
    snapshot, there = as_snapshot(port), bits(port)
    assert (snapshot.step, snapshot.attempt) == (3, 3)
    train(port, 4)
    far = bits(port)
    snapshot.restore(port)
    assert bits(port) == there == bits_of(snapshot)
    train(port, 4)
    assert bits(port) == far


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_back_to_before_the_first_update_where_no_moments_exist_yet(name: str) -> None:
    port = small_port(name=name)
    start, there = as_snapshot(port), bits(port)
    assert not any("|" in n for n in start.tensors)
    train(port, 2)
    moved = bits(port)
    assert any("|" in n for n, _ in port.state_tensors())
    start.restore(port)
    assert bits(port) == there
    assert not port.parts.optimizer.state
    train(port, 2)
    assert bits(port) == moved


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forward_from_before_the_first_update_brings_the_moments_back(name: str) -> None:
    port = small_port(name=name)
    start = as_snapshot(port)
    train(port, 2)
    later, there = as_snapshot(port), bits(port)
    train(port, 1)
    further = bits(port)
    start.restore(port)
    later.restore(port)
    assert bits(port) == there
    train(port, 1)
    assert bits(port) == further


def test_what_was_restored_is_not_tied_to_the_snapshot() -> None:
    """Training after a return must not train the snapshot's own memory."""
    port = small_port()
    start = as_snapshot(port)
    train(port, 2)
    later = as_snapshot(port)
    kept = bits_of(later)
    start.restore(port)
    later.restore(port)
    train(port, 3)
    assert bits_of(later) == kept
    assert later.intact()


ODD_BITS = [0x7FC00000, 0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001, 0x807FFFFF]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nan_patterns_infinities_minus_zero_and_subnormals_come_back_bit_for_bit(name: str) -> None:
    port = small_port(name=name)
    train(port, 2)
    odd = torch.tensor(ODD_BITS, dtype=torch.int64).to(torch.int32)
    for _, tensor in port.state_tensors():
        if tensor.dim():
            count = min(tensor.numel(), odd.numel())
            tensor.detach().view(torch.int32).view(-1)[:count] = odd[:count]
    there = bits(port)
    snapshot = as_snapshot(port)
    assert snapshot.intact()
    for _, tensor in port.state_tensors():
        tensor.detach().fill_(1.0)
    snapshot.restore(port)
    assert bits(port) == there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_formats_come_back_as_they_are(dtype: torch.dtype) -> None:
    port = small_port(name="adamw_torch", dtype=dtype)
    train(port, 2)
    snapshot, there = as_snapshot(port), bits(port)
    train(port, 2)
    snapshot.restore(port)
    assert bits(port) == there


def test_a_snapshot_is_not_changed_by_what_the_run_does_later() -> None:
    port = small_port()
    port.state.guard["rows"] = ["a:1#x"]
    train(port, 2)
    snapshot = as_snapshot(port)
    kept = bits_of(snapshot)
    train(port, 3)
    port.state.guard["rows"].append("b:2#y")
    port.state.scaler.back_off()
    assert bits_of(snapshot) == kept
    snapshot.restore(port)
    port.state.guard["rows"].append("c:3#z")
    train(port, 1)
    assert bits_of(snapshot) == kept
    assert snapshot.intact()


def test_a_return_drops_the_gradients_at_hand() -> None:
    port = small_port()
    snapshot = as_snapshot(port)
    for _, parameter in port.parts.parameters:
        parameter.grad = torch.ones_like(parameter)
    snapshot.restore(port)
    assert all(p.grad is None for _, p in port.parts.parameters)


def test_the_fingerprint_is_that_of_the_copied_state_whenever_it_is_asked_for() -> None:
    port = small_port()
    train(port, 2)
    there = fingerprint(port.state_tensors(), port.state_record())
    early, late = as_snapshot(port), Buffers().take(port)
    train(port, 2)
    assert early.mark == late.mark == there
    assert late.mark is late.mark


def test_a_copy_to_work_with_keeps_the_fingerprint_of_what_was_copied() -> None:
    """Who writes into it must not be able to change what it is compared with."""
    port = small_port()
    there = fingerprint(port.state_tensors(), port.state_record())
    snapshot = as_snapshot(port)
    snapshot.tensors[WEIGHT].fill_(1.0)
    assert snapshot.mark == there
    assert not snapshot.intact()


@pytest.mark.parametrize("where", ["weight", "moment", "record"])
def test_a_changed_bit_is_found(where: str) -> None:
    port = small_port()
    train(port, 2)
    snapshot = as_snapshot(port)
    assert snapshot.intact()
    if where == "record":
        snapshot.record["history"]["num_committed"] += 1
    else:
        name = next(n for n in snapshot.tensors if ("exp_avg" in n) == (where == "moment"))
        snapshot.tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    assert not snapshot.intact()


# ---------------------------------------------------------------- what does not fit is refused


def wider(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*t.shape[:-1], t.shape[-1] + 1, dtype=t.dtype)


WEIGHT, BIAS = "1.weight", "1.bias"
MISFITS = {
    "another shape of a weight": lambda t: t.update({WEIGHT: wider(t[WEIGHT])}),
    "another type of a weight": lambda t: t.update({WEIGHT: t[WEIGHT].double()}),
    "a weight is missing": lambda t: t.pop(BIAS),
    "a weight of another model": lambda t: t.update({"2.weight": torch.zeros(2, 2)}),
    "another shape of a moment": lambda t: t.update({f"{WEIGHT}|exp_avg": wider(t[WEIGHT])}),
    "another type of a moment": lambda t: t.update({f"{WEIGHT}|exp_avg": t[f"{WEIGHT}|exp_avg"].bfloat16()}),
    "a moment of another model": lambda t: t.update({"2.weight|exp_avg": torch.zeros(2, 2)}),
    "a moment without dimensions": lambda t: t.update({f"{WEIGHT}|exp_avg": torch.tensor(7.0)}),
    "a step count of a weight's shape": lambda t: t.update({f"{WEIGHT}|step": torch.zeros_like(t[WEIGHT])}),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_state_that_does_not_fit_is_refused_with_nothing_changed(misfit: str) -> None:
    port = small_port()
    train(port, 2)
    snapshot = as_snapshot(port)
    train(port, 2)
    MISFITS[misfit](snapshot.tensors)
    before = bits(port)
    with pytest.raises((KeyError, ValueError)):
        snapshot.restore(port)
    assert bits(port) == before


def test_a_snapshot_of_another_model_is_refused_with_nothing_changed() -> None:
    port, other = small_port(), small_port((5, 3, 2))
    train(port, 2)
    train(other, 3)
    before = bits(port)
    with pytest.raises(ValueError, match=r"0\.weight"):
        as_snapshot(other).restore(port)
    assert bits(port) == before


RECORD_FAULTS = {
    "another schema": lambda r: r.update(schema=-1),
    "no step": lambda r: r.pop("step"),
    "a broken history": lambda r: r["history"].pop("log_loss"),
    "a broken scaler": lambda r: r["scaler"].pop("scale"),
}


@pytest.mark.parametrize("fault", RECORD_FAULTS)
def test_a_record_that_does_not_fit_is_refused_with_nothing_changed(fault: str) -> None:
    port = small_port()
    train(port, 2)
    snapshot = as_snapshot(port)
    train(port, 2)
    RECORD_FAULTS[fault](snapshot.record)
    before = bits(port)
    with pytest.raises((KeyError, ValueError)):
        snapshot.restore(port)
    assert bits(port) == before


def test_copy_over_says_which_names_are_missing_and_which_are_foreign() -> None:
    with pytest.raises(KeyError, match=r"missing: \['b'\], foreign: \['c'\]"):
        copy_over({"a": torch.ones(1), "c": torch.ones(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)})


def test_copy_over_changes_nothing_where_only_the_last_does_not_fit() -> None:
    held = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match="b"):
        copy_over({"a": torch.ones(2), "b": torch.ones(3)}, held)
    assert torch.equal(held["a"], torch.zeros(2))
