"""One process on one device: the plain case, and the shape every other strategy follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Strategy:
    """Where the model lives and how ranks agree; here there is one rank, which agrees with itself."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the model where it trains."""
        return model.to(self.device)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss`` to the parameters."""
        loss.backward()  # type: ignore[no-untyped-call]

    def sum_tokens(self, count: int) -> int:
        """Supervised tokens of the step over all ranks."""
        return count
