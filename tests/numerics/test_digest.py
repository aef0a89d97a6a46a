"""A digest changes with any bit, name, dtype or shape, and with nothing else."""

from __future__ import annotations

import torch

from finitune.numerics.digest import digest

BASE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def test_equal_state_has_equal_digests_wherever_it_lies_in_memory() -> None:
    transposed_twice = BASE.t().contiguous().t()
    assert digest([("w", BASE)]) == digest([("w", transposed_twice)])
    assert digest([("w", BASE)], {"b": 1, "a": [2.0]}) == digest([("w", BASE.clone())], {"a": [2.0], "b": 1})


def test_every_difference_shows() -> None:
    last_bit = BASE.clone()
    last_bit[1, 1] = torch.nextafter(last_bit[1, 1], torch.tensor(9.0))
    zero, minus_zero = torch.tensor([0.0]), torch.tensor([-0.0])
    states = [
        digest([("w", BASE)]),
        digest([("v", BASE)]),
        digest([("w", last_bit)]),
        digest([("w", BASE.flatten())]),
        digest([("w", BASE.double())]),
        digest([("w", BASE)], {"step": 1}),
        digest([("w", BASE)], {"step": 2}),
        digest([("w", zero)]),
        digest([("w", minus_zero)]),
        digest([("w", BASE.to(torch.bfloat16))]),
        digest([]),
    ]
    assert len(set(states)) == len(states)


def test_non_finite_values_have_a_digest_too() -> None:
    nan = torch.tensor([float("nan")])
    assert digest([("w", nan)], {"loss": float("nan")}) == digest([("w", nan.clone())], {"loss": float("nan")})
    assert digest([("w", nan)]) != digest([("w", -nan)])
