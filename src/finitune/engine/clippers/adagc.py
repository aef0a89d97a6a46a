"""AdaGC: clips each parameter tensor by a running mean of its own gradient norm.

What it does:
    During the first 100 updates all gradients are clipped together to `max_grad_norm` (1), and each tensor remembers
    the least of its clipped norms. Then each tensor is clipped to 1.05 times its remembered norm, which follows the
    clipped norms slowly (0.98 old, 0.02 new).

When:
    Spikes come from single tensors (embeddings, one layer), and clipping everything would slow down the rest.

Safety:
    LOSSY: updates of some tensors become smaller. Norms that are not finite are refused and enter nothing. A norm of 0
    enters nothing either: in the original a tensor whose first gradient is 0 (the A of LoRA, since B is 0) remembers 0
    and is clipped to 0 for ever. A tensor that remembers nothing yet is clipped as during the first updates.

Source:
    Wang et al. 2025, arXiv 2502.11034, with its constants; pytorch_optimizer/optimizer/adagc.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finitune.engine.clippers._norms import LARGEST_NORM, check_norm, factor_to, load_count, load_norms, tightest

RELATIVE = 1.05
BETA = 0.98
WARMUP_UPDATES = 100


class Clipper:
    """A remembered norm for each tensor; one factor for each."""

    def __init__(self, max_grad_norm: float | None = 1.0) -> None:
        self.max_grad_norm = max_grad_norm
        self._updates = 0
        self._remembered: list[float] = []
        """By tensor; 0.0 where nothing is remembered."""

    def factor(self, grad_norm: float, norms: Sequence[float] = ()) -> list[float]:
        """What the gradients of an update that will be made are multiplied by, each in (0, 1]; norms are remembered.

        Args:
            grad_norm: L2 norm of all gradients, without loss scale.
            norms: that of each gradient, in the same order always; 0.0 where a parameter has none.

        Raises:
            ValueError: a norm is not finite, or there are more or fewer than before; nothing is remembered then.
        """
        total = check_norm(grad_norm)
        each = [check_norm(n, f"the norm of gradient {i}") for i, n in enumerate(norms)]
        if self._remembered and len(each) != len(self._remembered):
            raise ValueError(f"{len(each)} gradients, where there were {len(self._remembered)} before")
        remembered = self._remembered or [0.0] * len(each)
        self._updates += 1
        together = factor_to(tightest(self.max_grad_norm), total, eps=0.0) if total else 1.0
        pairs = [self._one(n, old, together) for n, old in zip(each, remembered, strict=True)]
        self._remembered = [new for _, new in pairs]
        return [factor for factor, _ in pairs]

    def _one(self, norm: float, old: float, together: float) -> tuple[float, float]:
        """Factor of one tensor, and what it remembers from now on."""
        if norm == 0.0:
            return 1.0, old
        if old == 0.0:
            return together, together * norm
        if self._updates < WARMUP_UPDATES:
            return together, min(old, together * norm)
        factor = factor_to(RELATIVE * old, norm, eps=0.0)
        return factor, min(LARGEST_NORM, BETA * old + (1 - BETA) * factor * norm)  # rounding may go beyond

    def state(self) -> dict[str, Any]:
        """JSON-able state, exact."""
        return {"updates": self._updates, "remembered": list(self._remembered)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave. Raises ValueError, changing nothing, where it cannot be that."""
        updates, remembered = load_count(state, "updates"), load_norms(state, "remembered")
        self._updates, self._remembered = updates, remembered
