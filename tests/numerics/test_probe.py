"""A few elements tell whether an update moved the weights."""

from __future__ import annotations

import math

import torch

from finitune.numerics.probe import movement, sample


def test_a_sample_is_a_copy_of_evenly_spaced_elements() -> None:
    weight = torch.arange(1000.0)
    taken = sample([weight, torch.ones(3)], per_tensor=10)
    assert taken.tolist() == [float(100 * i) for i in range(10)] + [1.0, 1.0, 1.0]
    weight.zero_()
    assert taken[5] == 500.0


def test_movement_is_relative_size_and_share() -> None:
    before = torch.tensor([3.0, 4.0, 0.0, 0.0])
    ratio, share = movement(before, before + torch.tensor([0.0, 0.0, 0.5, 0.0]))
    assert (ratio, share) == (0.1, 0.25)
    assert movement(before, before) == (0.0, 0.0)


def test_an_update_below_the_precision_of_bf16_moves_nothing() -> None:
    weight = torch.ones(100, dtype=torch.bfloat16)
    before = sample([weight])
    weight += 1e-4
    assert movement(before, sample([weight])) == (0.0, 0.0)


def test_weights_of_zero_have_no_ratio() -> None:
    ratio, share = movement(torch.zeros(2), torch.ones(2))
    assert math.isnan(ratio)
    assert share == 1.0
