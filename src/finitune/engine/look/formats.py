"""The number formats of trained weights, and what an optimizer can do in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.codes_state import HALF_TRAINED, UPDATES_LOST

# Smaller than half of the smallest subnormal number, an eps is rounded to 0.
_FP16_VANISHES = 2.0**-25
# Bits of the significand, the hidden one included.
_BITS = {torch.float16: 11, torch.bfloat16: 8}
_FEW = 0.5
"""Share of elements that an update can move below which most of it is lost."""
_SAMPLE = 4096
# Optimizers whose update is about the learning rate, whatever the gradient, and computed in the weights' format.
_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


def _groups(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    """Parameter groups of torch's own Adams: what others do with half weights is their own matter."""
    if type(optimizer) in _ADAMS:
        yield from optimizer.param_groups


def half_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Finding]:
    """OPT110 where fp16 weights are trained by an Adam whose eps is 0 in fp16."""
    names = {id(p): n for n, p in model.named_parameters()}
    bad, total, eps = list[Tensor](), 0, 0.0
    for group in _groups(optimizer):
        trained = [p for p in group["params"] if p.requires_grad]
        total += len(trained)
        if float(group.get("eps", 1.0)) <= _FP16_VANISHES and not group.get("fused"):
            found = [p for p in trained if p.dtype == torch.float16]
            eps = float(group["eps"]) if found else eps
            bad += found
    if not bad:
        return []
    name = names.get(id(bad[0]), "-")
    kind = type(optimizer).__name__
    return [HALF_TRAINED.find(name, name=name, count=len(bad), total=total, eps=eps, optimizer=kind, fault_class="D")]


_ASKED_UPDATES = (0, 1, 10, 100, 1000)


def _scheduled(group: Mapping[str, Any], number: int, scheduler: Any) -> float:
    """The highest learning rate that a group will have, as far as it is known: a warm-up starts at 0."""
    initial = float(group.get("initial_lr", group["lr"]))
    factors = getattr(scheduler, "lr_lambdas", None)
    if not isinstance(factors, list) or number >= len(factors):
        return max(float(group["lr"]), initial)
    return max(float(group["lr"]), *(initial * float(factors[number](n)) for n in _ASKED_UPDATES))


def updates_lost(optimizer: torch.optim.Optimizer, scheduler: Any = None) -> list[Finding]:
    """OPT111 where an update of the learning rate's size moves fewer than half of the half-precision weights.

    Rounded to nearest, w + d is w again where the size of d is less than half of the last bit of w.
    """
    moved, count, seen = 0.0, 0, 0
    rates, dtypes = set[float](), set[torch.dtype]()
    for number, group in enumerate(_groups(optimizer)):
        rate = _scheduled(group, number, scheduler)
        trained = [p for p in group["params"] if p.requires_grad and p.dtype in _BITS and p.numel()]
        if not trained or not 0.0 < rate < math.inf:
            continue
        rates.add(rate)
        for parameter in trained:
            part = _spread(parameter)
            share = _movable(part, rate, _BITS[parameter.dtype])
            moved += share * parameter.numel()
            seen += parameter.numel()
            count += 1
            dtypes.add(parameter.dtype)
    if not seen or moved / seen >= _FEW:
        return []
    return [
        UPDATES_LOST.find(
            "",
            count=count,
            dtype=", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)),
            optimizer=type(optimizer).__name__,
            lr=max(rates),
            percent=100.0 * moved / seen,
            fault_class="J",
        )
    ]


def _spread(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].float()


def _movable(values: Tensor, size: float, bits: int) -> float:
    """Share of the values that change when ``size`` is added to them in a format of so many bits."""
    _, exponent = torch.frexp(values)
    half_bit = torch.ldexp(torch.ones_like(values), exponent - bits - 1)
    return float(((values == 0) | (half_bit < size)).float().mean())
