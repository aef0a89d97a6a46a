"""AutoClip: clips to a percentile of the gradient norms seen so far.

What it does:
    The norm joins those of the last 1024 updates; the limit is their 10th percentile. It adapts to any size of
    gradients without a setting, and it clips nine updates out of ten: with it the learning rate acts on directions.

When:
    Gradient norms are spread over orders of magnitude, so that no fixed limit fits.

Safety:
    LOSSY: nearly all updates become smaller. A norm that is not finite is refused and enters nothing (in the
    original one NaN makes the percentile NaN for ever). Percentile 0 (no gradient most of the time) clips nothing.

Source:
    Seetharaman et al. 2020, arXiv 2007.14469, and autoclip.py of its authors. The original keeps all norms for ever;
    here the newest 1024, so that the state stays small and an early phase is forgotten.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from finitune.engine.clippers._norms import check_norm, factor_to, load_norms, tightest

PERCENTILE = 10.0
WINDOW_UPDATES = 1024


class Clipper:
    """The newest norms; one factor for all gradients."""

    def __init__(self, max_grad_norm: float | None = None) -> None:
        self.max_grad_norm = max_grad_norm
        self._norms: deque[float] = deque(maxlen=WINDOW_UPDATES)

    def factor(self, grad_norm: float, norms: Sequence[float] = ()) -> float:  # noqa: ARG002 (one signature for all)
        """What the gradients of an update that will be made are multiplied by, in (0, 1]; the norm is remembered.

        Args:
            grad_norm: L2 norm of all gradients, without loss scale.
            norms: not used.

        Raises:
            ValueError: the norm is not finite; nothing is remembered then.
        """
        norm = check_norm(grad_norm)
        self._norms.append(norm)
        return factor_to(tightest(percentile(self._norms, PERCENTILE), self.max_grad_norm), norm)

    def state(self) -> dict[str, Any]:
        """JSON-able state, exact."""
        return {"norms": list(self._norms)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave. Raises ValueError, changing nothing, where it cannot be that."""
        self._norms = deque(load_norms(state, "norms"), maxlen=WINDOW_UPDATES)


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile of one or more finite numbers, linear between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
