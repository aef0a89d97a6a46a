"""Whether all ranks still hold the same weights and moments: the same updates from the same gradients keep their bits.

After every update a part of the weights is compared by the sum of their bits, the whole within a round of steps; where
they differ everything is. With three ranks or more the many are right; of two, one that is not finite is wrong; else
it cannot be told, and rank 0's state is taken.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from finitune.adapters.codes_ranks import REPLICAS_DIFFER
from finitune.adapters.ranks_mirror import Mirror
from finitune.adapters.ranks_port import RanksPort
from finitune.core.types import Finding
from finitune.numerics.statecheck import bad_tensors

ROUND_STEPS = 8
_EXACT = (1 << 52) - 1
"""fp64 carries integers up to here."""
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAX_SHOWN = 4


class Replicas:
    """Compares the ranks of one port. Every method but :meth:`part` is a collective."""

    def __init__(self, port: RanksPort) -> None:
        self.port, self.ranks = port, port.ranks

    @torch.no_grad()
    def part(self, updates: int) -> float:
        """The bits of a part of the weights as one number, exact in fp64; another part after each update."""
        mine = [p for i, (_, p) in enumerate(self.port.parameters()) if i % ROUND_STEPS == updates % ROUND_STEPS]
        sums = [_bits(p).sum(dtype=torch.int64) for p in mine if p.numel()]
        return float(int(torch.stack([s.cpu() for s in sums]).sum()) & _EXACT) if sums else 0.0

    def compared(self, mirror: Mirror, step: int) -> tuple[Finding, int] | None:
        """What differs before ``step``, and the rank that is right; None where nothing does."""
        mirror.forget()
        listed = self.ranks.gather_json(mirror.listed())
        everywhere = [{n: what for n, *what in one} for one in listed]
        names = [n for n in everywhere[0] if any(one.get(n) != everywhere[0][n] for one in everywhere)]
        names += sorted({n for one in everywhere for n in one} - set(everywhere[0]))
        if not names:
            return None
        right, wrong = self._right([str([one.get(n) for n in names]) for one in everywhere])
        return self._finding(dict(mirror.tensors()).get(names[0]), names, right, wrong, step), right

    def _right(self, states: list[str]) -> tuple[int, str]:
        count = Counter(states).most_common()
        if len(count) == 1 or count[0][1] > count[1][1]:
            right = states.index(count[0][0])
            wrong = [r for r, s in enumerate(states) if s != states[right]]
            return right, ", ".join(map(str, wrong))
        bad = [row[0] for row in self.ranks.gather([float(len(bad_tensors(self.port.state_tensors())))])]
        if min(bad) == 0 < max(bad):
            return bad.index(0), ", ".join(str(r) for r, b in enumerate(bad) if b)
        return 0, "?"

    @torch.no_grad()
    def _finding(self, first: Tensor | None, names: list[str], right: int, wrong: str, step: int) -> Finding:
        """The first place that differs, with its value on every rank."""
        index, values = self._first(first, right)
        shown = "; ".join(f"rank {r}: {v}" for r, v in enumerate(values[:_MAX_SHOWN])) or "-"
        place = "" if index is None else f"[{index}]"
        numbers: dict[str, Any] = {"count": len(names), "step": step, "first": names[0], "place": place}
        numbers |= {"values": shown, "wrong": wrong, "names": names[:_MAX_SHOWN], "right": right}
        return REPLICAS_DIFFER.find(names[0], fault_class="T", **numbers)

    def _first(self, own: Tensor | None, right: int) -> tuple[int | None, list[Any]]:
        shapes = self.ranks.gather_json(None if own is None else [list(own.shape), str(own.dtype)])
        if own is None or any(s != shapes[0] for s in shapes) or not own.numel():
            return None, []
        theirs = self.ranks.share_tensor(own, right)
        apart = (_bits(own) != _bits(theirs)).nonzero()
        found = [int(row[0]) for row in self.ranks.gather([float(apart[0]) if len(apart) else -1.0])]
        index = next((i for i in found if i >= 0), None)
        value = None if index is None else float(own.detach().reshape(-1)[index])
        return index, self.ranks.gather_json(value)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(_AS_INTEGERS[tensor.element_size()])
