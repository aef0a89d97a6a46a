"""The way back to the first of several batches that were given up: nothing is computed, a seal tells what it is."""

from __future__ import annotations

import torch

from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.skips import Skips
from finitune.engine.snapshot import as_snapshot
from support.replay_port import BarePort
from support.tiny_ports import llama_port


def step(port: BarePort) -> None:
    reading = read(port.forward_backward())
    port.commit(reading)
    port.settle(Action.PROCEED, reading, clean=True)


def skip(port: BarePort, skips: Skips, num_skipped: int) -> None:
    reading = read(port.forward_backward())
    port.abort()
    skips.note(num_skipped)
    port.settle(Action.SKIP_BATCH, reading, clean=False)


def skipped(num: int) -> tuple[BarePort, Skips, str]:
    """A port that gave batches up after two good ones, and the digest of the state before the first of them."""
    port = llama_port(steps=9)
    skips = Skips(port)
    step(port)
    step(port)
    before = as_snapshot(port).mark.digest
    for count in range(num):
        skip(port, skips, count)
    return port, skips, before


def test_the_first_of_them_is_had_back_bit_for_bit() -> None:
    port, skips, before = skipped(3)
    [base] = skips.bases()
    assert (base.step, base.attempt) == (2, 2)
    assert as_snapshot(port).mark.digest != before
    base.restore(port)
    assert as_snapshot(port).mark.digest == before


def test_a_committed_step_ends_it() -> None:
    port, skips, _ = skipped(2)
    step(port)
    assert list(skips.bases()) == []


def test_a_tensor_that_was_changed_in_another_way_ends_it() -> None:
    port, skips, _ = skipped(2)
    with torch.no_grad():
        port.parameters()[0][1].view(-1)[3] += 1.0
    assert list(skips.bases()) == []


def test_a_run_that_went_back_before_them_has_none() -> None:
    port = llama_port(steps=9)
    skips = Skips(port)
    start = as_snapshot(port)
    skip(port, skips, 0)
    skip(port, skips, 1)
    again = llama_port(steps=9)
    assert [b.step for b in skips.bases()] == [0]
    step(port)
    start.restore(port)
    assert [b.step for b in skips.bases()] == [0]  # nothing was committed on the line that is left
    assert list(Skips(again).bases()) == []


def test_without_any_there_is_none() -> None:
    port = llama_port(steps=2)
    assert list(Skips(port).bases()) == []
