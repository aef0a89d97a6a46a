"""ZClip: clips a gradient whose norm stands out from a running mean by more than 2.5 standard deviations.

What it does:
    During the first 25 updates it only collects norms (and clips to `max_grad_norm`). Then, with the running mean mu
    and deviation sd: z = (norm - mu) / (sd + 1e-6). Above 2.5 the limit is mu + 2.5 sd / (z / 2.5): the further out,
    the tighter. The clipped norm enters the statistics, so one spike does not widen the limit for the next.

When:
    Now and then a gradient is far larger than the ones before it, and the size of the usual ones changes slowly.

Safety:
    LOSSY: updates of some steps become smaller. A norm that is not finite is refused and enters nothing. Where the
    statistics give no positive limit (all norms 0 so far) only `max_grad_norm` holds.

Source:
    Kumar et al. 2025, arXiv 2504.02507, and zclip/zclip.py of its authors: mode "zscore", option "adaptive_scaling".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finitune.engine.clippers._norms import LARGEST_NORM, check_norm, factor_to, load_norm, load_norms, tightest

ALPHA = 0.97
Z_LIMIT = 2.5
WARMUP_UPDATES = 25
EPS = 1e-6


class Clipper:
    """Running mean and variance of the norm; one factor for all gradients."""

    def __init__(self, max_grad_norm: float | None = 1.0) -> None:
        self.max_grad_norm = max_grad_norm
        self._first: list[float] = []
        self._mean, self._variance = 0.0, 0.0

    def factor(self, grad_norm: float, norms: Sequence[float] = ()) -> float:  # noqa: ARG002 (one signature for all)
        """What the gradients of an update that will be made are multiplied by, in (0, 1]; the norm is remembered.

        Args:
            grad_norm: L2 norm of all gradients, without loss scale.
            norms: not used.

        Raises:
            ValueError: the norm is not finite; nothing is remembered then.
        """
        norm = check_norm(grad_norm)
        if len(self._first) < WARMUP_UPDATES:
            self._collect(norm)
            return factor_to(tightest(self.max_grad_norm), norm, EPS)
        limit = self._limit(norm)
        self._remember(norm if limit is None else limit)
        return factor_to(tightest(limit, self.max_grad_norm), norm, EPS)

    def _collect(self, norm: float) -> None:
        self._first.append(norm)
        if len(self._first) == WARMUP_UPDATES:
            self._mean = min(LARGEST_NORM, math.fsum(self._first) / WARMUP_UPDATES)
            self._variance = math.fsum((n - self._mean) ** 2 for n in self._first) / WARMUP_UPDATES

    def _limit(self, norm: float) -> float | None:
        deviation = math.sqrt(self._variance)
        z = (norm - self._mean) / (deviation + EPS)
        limit = self._mean + Z_LIMIT * deviation / (z / Z_LIMIT) if z > Z_LIMIT else 0.0
        return limit if limit > 0.0 else None

    def _remember(self, norm: float) -> None:
        self._mean = min(LARGEST_NORM, ALPHA * self._mean + (1 - ALPHA) * norm)  # rounding may go beyond
        self._variance = ALPHA * self._variance + (1 - ALPHA) * (norm - self._mean) ** 2

    def state(self) -> dict[str, Any]:
        """JSON-able state, exact."""
        return {"first": list(self._first), "mean": self._mean, "variance": self._variance}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave. Raises ValueError, changing nothing, where it cannot be that."""
        first, mean = load_norms(state, "first"), load_norm(state, "mean")
        variance = state.get("variance")
        if len(first) > WARMUP_UPDATES or not isinstance(variance, int | float) or not 0.0 <= variance < math.inf:
            raise ValueError(f"the stored state of zclip has {len(first)} first norms and the variance {variance!r}")
        self._first, self._mean, self._variance = first, mean, float(variance)
