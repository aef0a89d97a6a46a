"""The context of every forward pass: the configured precision, or what the conditions in force make of it.

Training, evaluation and sampling all compute in it, so that a cure holds for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from finitune.core.errors import UserError
from finitune.engine.conditions import NotPossible
from finitune.models import precision as precisions
from finitune.models.precision import Precision

Inside = Callable[[], AbstractContextManager[Any]]


class Compute:
    """Call it for a new context; one for every forward, with its backward inside."""

    def __init__(self, configured: Precision, device: torch.device) -> None:
        self.configured, self.device = configured, device
        self.precision = configured
        """In force."""
        self.inside: Inside | None = None
        """A further context inside of the precision's."""

    def __call__(self) -> AbstractContextManager[Any]:
        """The context for one forward and backward."""
        base = precisions.compute_context(self.precision, self.device)
        return base if self.inside is None else _nested(base, self.inside)

    def named(self, name: str | None) -> Precision:
        """The precision that a condition names: "fp32", "bf16", or None for the configured one. Raises NotPossible."""
        if name is None or name == self.configured.name.partition("-")[0]:
            return self.configured
        if name == "bf16" and self.configured.emulated:
            return precisions.PRECISIONS["bf16-emulated"]
        if name not in ("fp32", "bf16"):
            raise NotPossible(f"there is no way from {self.configured.name} to {name}")
        try:
            return precisions.choose(name, self.device).precision
        except UserError as error:
            raise NotPossible(str(error)) from error

    @property
    def half_weights(self) -> bool:
        """The weights themselves are half: another precision means other weights."""
        return self.configured.weights != torch.float32

    def checkpoint_kwargs(self) -> dict[str, Any]:
        """Arguments for gradient checkpointing: what is computed again is computed in the precision in force."""
        kwargs = precisions.checkpoint_kwargs(self.configured)
        return {**kwargs, "context_fn": self._again} if "context_fn" in kwargs else kwargs

    def _again(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts of the first pass (it is entered already) and of the second."""
        return nullcontext(), precisions.compute_context(self.precision, self.device)


@contextmanager
def _nested(base: AbstractContextManager[Any], inside: Inside) -> Iterator[None]:
    with base, inside():
        yield
