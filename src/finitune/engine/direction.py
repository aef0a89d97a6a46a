"""Which way an update goes: the optimizer's own first moment says where it should, element by element.

What an optimizer of Adam's family or SGD does to one weight has the sign of its first moment (Kingma & Ba 2015,
arXiv:1412.6980, algorithm 1: w <- w - lr * m / (sqrt(v) + eps); Loshchilov & Hutter 2019, arXiv:1711.05101: apart from
the decay), and the moment itself moves towards the gradient: m - beta * m_before = (1 - beta) * g. Neither hangs on
rate, clipping, bias correction or second moment, and both hold for every element, so a few of each weight tell. Weights
that a decay or a rounding may have moved do not count.

A slot that is called a first moment is believed to be one in torch's own optimizers and those of their names. In
others it is taken for one where it moves as one: towards the gradient, by its own beta. Nothing is said where it does
not (Lion, positive-negative momentum, averaged weights) or cannot be read (8 bits, projected moments).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FIRST = ("exp_avg", "momentum_buffer")
"""Slots that hold a first moment in torch and in the packages that follow its names."""
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf")
"""Slots that scale a step and have no sign: an optimizer with no others goes against the gradient."""
_PLAIN_NAMES = ("adam", "adamw", "sgd", "fusedadam", "fusedsgd", "cpuadam", "deepspeedcpuadam", "distributedfusedadam")
_FEW, _BELIEVED_SHARE = 64, 0.1
"""A slot is a first moment where so many elements of it moved, and no more than this share away from the gradient."""
_MARGIN = 2.0
"""A movement counts where it is larger than so many times what the decay explains."""
_ROUNDINGS = 1.0
"""... and than the last place of the weight."""


@dataclass(frozen=True, slots=True)
class Direction:
    """What the elements of one parameter that were looked at did."""

    name: str
    what: str
    """"weight": against the first moment (or, without one, the gradient); "moment": towards the gradient."""
    num: int
    """Elements whose movement neither decay nor rounding explains."""
    num_wrong: int
    """Those of them that went the other way."""

    @property
    def share(self) -> float:
        """Of the elements that count, those that went the other way; 0 where none counts."""
        return self.num_wrong / self.num if self.num else 0.0


@dataclass(frozen=True, slots=True)
class _Entry:
    """One parameter, as it is right before the update."""

    name: str
    parameter: nn.Parameter
    slot: str | None
    """None: the gradient tells the direction."""
    decay: float
    """Share of a weight that the decay takes in this update, at most."""
    coupled: float
    """What of a weight the decay may add to the gradient that the moment takes in."""
    sign: float
    """-1 where the optimizer climbs on purpose."""
    nesterov: float
    """Factor of the moment beside the gradient; 0: the moment alone."""
    beta: float | None
    """Of the moment's recursion; None: not known."""
    plain: bool
    """The optimizer claims to be Adam, AdamW or SGD."""


class Look:
    """A sample of all weights around one update: :meth:`take` right before it, :meth:`compare` after it."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], blocks: int, width: int, shift: int = 0) -> None:
        """Of every tensor ``blocks`` blocks of ``width`` neighbours, evenly spaced, the first at ``shift``."""
        self.parameters, self.blocks, self.width, self.shift = parameters, blocks, width, shift
        self._optimizer: torch.optim.Optimizer | None = None
        self._taken: list[tuple[list[_Entry], Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def take(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A hook before the optimizer's step. An optimizer that calls its parent's step() comes here twice."""
        if self._optimizer is not None:
            return
        self._optimizer = optimizer
        try:
            known = [e for e in _entries(optimizer, self.parameters) if e.parameter.numel() >= self.width]
            self._taken = [self._sampled(entries) for entries in _by_device(known)]
        except (RuntimeError, TypeError, ValueError, KeyError):
            self._taken = []  # an optimizer of a kind of its own: a look may not cost the run

    def _sampled(self, entries: list[_Entry]) -> tuple[list[_Entry], Tensor, Tensor, Tensor]:
        weights = self._joined([e.parameter for e in entries])
        gradients = self._joined([e.parameter.grad for e in entries])
        assert self._optimizer is not None
        return entries, weights, gradients, self._moments(self._optimizer, entries)

    def _moments(self, optimizer: torch.optim.Optimizer, entries: list[_Entry]) -> Tensor:
        """The first moments, 0 where there is none (yet)."""
        zero = torch.zeros(1, device=entries[0].parameter.device)
        found = [None if e.slot is None else optimizer.state.get(e.parameter, {}).get(e.slot) for e in entries]
        parts = [
            zero.expand(self._num_rows(e.parameter), self.width) if m is None else self._picked(m)
            for e, m in zip(entries, found, strict=True)
        ]
        return torch.cat(parts).view(-1).float()

    def _joined(self, tensors: Sequence[Any]) -> Tensor:
        return torch.cat([self._picked(t) for t in tensors]).view(-1).float()

    def _num_rows(self, tensor: Tensor) -> int:
        return min(self.blocks, tensor.numel() // self.width)

    def _picked(self, tensor: Tensor) -> Tensor:
        """(rows, width) of a tensor whose elements lie in order; a view."""
        rows = self._num_rows(tensor)
        stride = tensor.numel() // rows
        start = tensor.storage_offset() + self.shift % max(1, stride - self.width)
        return tensor.as_strided((rows, self.width), (stride, 1), start)

    @torch.no_grad()
    def compare(self) -> list[Direction]:
        """What the weights and the moments did since; empty where no update was made. One host read a device."""
        if self._optimizer is None:
            return []
        try:
            return [d for taken in self._taken for d in self._compared(self._optimizer, *taken)]
        except (RuntimeError, TypeError, ValueError, KeyError):
            return []

    def _compared(
        self, optimizer: torch.optim.Optimizer, entries: list[_Entry], w0: Tensor, g: Tensor, m0: Tensor
    ) -> Iterator[Direction]:
        w1, m1 = self._joined([e.parameter for e in entries]), self._moments(optimizer, entries)
        each = _Spread(entries, [self._num_rows(e.parameter) * self.width for e in entries], w0.device)
        gradient = g * each.of(lambda e: e.sign)
        size = torch.maximum(w0.abs(), w1.abs())
        slack = size * each.of(lambda e: _MARGIN * e.decay + _ROUNDINGS * torch.finfo(e.parameter.dtype).eps)
        by_moment = each.of(lambda e: float(e.slot is not None)) > 0
        mixed = torch.where(each.of(lambda e: e.nesterov) > 0, gradient + each.of(lambda e: e.nesterov) * m1, m1)
        counted, wrong = _held(w0 - w1, slack, torch.where(by_moment, mixed, gradient))
        known = each.of(lambda e: float(e.slot is not None and e.beta is not None)) > 0
        beta = each.of(lambda e: e.beta if e.beta is not None else 0.0)
        slack_m = _ROUNDINGS * torch.maximum(m0.abs(), m1.abs()) * each.of(lambda e: _eps_of(optimizer, e))
        slack_m += _MARGIN * size * each.of(lambda e: e.coupled)
        counted_m, wrong_m = _held(m1 - beta * m0, slack_m, gradient)
        rows = each.sums(counted, wrong, counted_m & known, wrong_m & known)
        for entry, (num, num_wrong, num_m, num_wrong_m) in zip(entries, rows, strict=True):
            if entry.plain or entry.slot is None or (num_m >= _FEW and num_wrong_m <= _BELIEVED_SHARE * num_m):
                yield Direction(entry.name, "weight", num, num_wrong)
            if entry.plain and num_m:
                yield Direction(entry.name, "moment", num_m, num_wrong_m)


def _held(moved: Tensor, slack: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Which elements count, and which of them went against ``wanted``. What is not a number does not count."""
    counted = (moved.abs() > slack) & (wanted.abs() > 0)
    return counted, counted & ((moved > 0) != (wanted > 0))


class _Spread:
    """Numbers of entries as one vector over the elements of all of them, and back."""

    def __init__(self, entries: list[_Entry], lengths: list[int], device: torch.device) -> None:
        self.entries, self.lengths = entries, torch.tensor(lengths, device=device)

    def of(self, number: Any) -> Tensor:
        """``number(entry)`` for each element; one number where all entries have the same."""
        values = [float(number(e)) for e in self.entries]
        if len(set(values)) == 1:
            return torch.tensor(values[0], device=self.lengths.device)
        return torch.tensor(values, device=self.lengths.device).repeat_interleave(self.lengths)

    def sums(self, *masks: Tensor) -> list[list[int]]:
        """Counts of each mask by entry."""
        ends = self.lengths.cumsum(0)
        running_KN = torch.stack(list(masks)).int().cumsum(1)
        upto_KE = running_KN[:, ends - 1]
        counts_KE = torch.cat([upto_KE[:, :1], upto_KE.diff(dim=1)], dim=1)
        counts: list[list[int]] = counts_KE.T.tolist()
        return counts


@contextmanager
def looking(optimizer: Any, look: Look) -> Iterator[None]:
    """Inside, the next step() of the optimizer is looked at; nothing is hooked afterwards."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        yield
        return
    handle = optimizer.register_step_pre_hook(look.take)
    try:
        yield
    finally:
        handle.remove()


# -- what is known of an optimizer ---------------------------------------------------------------------------------


def _entries(optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]) -> Iterator[_Entry]:
    """The parameters of which something can be said."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    plain = is_plain(optimizer)
    for name, parameter in parameters:
        group = groups.get(id(parameter))
        if group is None or not _is_dense(parameter) or not _is_dense(parameter.grad):
            continue
        state = optimizer.state.get(parameter, {})
        slot = _slot(state, parameter)
        if slot == "":
            continue
        fresh = not any(isinstance(v, Tensor) and v.numel() > 1 for v in state.values())
        if slot is None and fresh and (_has_momentum(group) or not plain):
            continue  # the moments do not exist before the first update, or are kept elsewhere
        sign = -1.0 if group.get("maximize") else 1.0
        nesterov = float(group.get("momentum", 0.0)) if group.get("nesterov") and slot == FIRST[1] else 0.0
        beta = _beta(group, slot)
        coupled = abs(float(group.get("weight_decay") or 0.0)) * (1.0 if slot == FIRST[1] else 1.0 - (beta or 0.0))
        yield _Entry(name, parameter, slot, _decay(group), coupled, sign, nesterov, beta, plain)


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """It claims to be Adam, AdamW or SGD: another update than theirs is a fault.

    Others of the family (AdamP, schedule-free and their like) differ on purpose.
    """
    if isinstance(optimizer, torch.optim.Adam | torch.optim.SGD):
        return True
    return type(optimizer).__name__.lower() in _PLAIN_NAMES


def _is_dense(tensor: Any) -> bool:
    """An ordinary dense tensor whose elements lie in order."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return ordinary and tensor.is_floating_point() and tensor.is_contiguous()


def _slot(state: Mapping[str, Any], parameter: Tensor) -> str | None:
    """The slot of the first moment; None: there is none and the gradient tells; "": nothing can be told."""
    slots = [n for n, v in state.items() if isinstance(v, Tensor) and v.numel() > 1]
    first = next((n for n in FIRST if n in slots), None)
    if first is not None:
        fits = _is_dense(state[first]) and state[first].shape == parameter.shape
        return first if fits and state[first].device == parameter.device else ""
    return None if all(n in SECOND for n in slots) else ""


def _has_momentum(group: Mapping[str, Any]) -> bool:
    given = group.get("betas", (group.get("momentum", 0.0),))
    return bool(given and isinstance(given, Sequence) and given[0])


def _beta(group: Mapping[str, Any], slot: str | None) -> float | None:
    given = group.get("betas", (None,))[0] if slot == FIRST[0] else group.get("momentum")
    return float(given) if isinstance(given, float | int | Tensor) else None


def _decay(group: Mapping[str, Any]) -> float:
    """Share of a weight that its decay may take; some optimizers do not multiply it by the rate, if asked."""
    decay = abs(float(group.get("weight_decay") or 0.0))
    return decay if group.get("fixed_decay") else decay * abs(float(group.get("lr", 1.0)))


def _eps_of(optimizer: torch.optim.Optimizer, entry: _Entry) -> float:
    """Rounding of the moment's format."""
    held = None if entry.slot is None else optimizer.state.get(entry.parameter, {}).get(entry.slot)
    return float(torch.finfo(held.dtype).eps) if isinstance(held, Tensor) else 0.0


def _by_device(entries: Iterable[_Entry]) -> list[list[_Entry]]:
    found: dict[torch.device, list[_Entry]] = {}
    for entry in entries:
        found.setdefault(entry.parameter.device, []).append(entry)
    return list(found.values())
