"""What is looked at in the training state after an update, and when.

The weights are looked at after every update. The moments too where the state is small, or enough tokens were computed
since the last look, so that it is a quarter of a per cent of the work; else every few updates: a bad moment shows in
the weights at once, or (an infinite second moment) stops them. What somebody else wrote between two steps is looked at
in the very next one: torch counts the in-place writes of every tensor (``Tensor._version``, by which autograd refuses
stale saved tensors), and to read the counts costs microseconds. What torch does not count (``.data``, numpy, a kernel
past its end, a bit that flips) is left to the whole look.

Source: https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
"""

from __future__ import annotations

import torch
from torch import Tensor

from finitune.engine.port import ReplayPort
from finitune.numerics.statecheck import ABSURD, bad_tensors

_TOKENS_A_LOOK = {"cpu": 2**12}
"""A whole look reads 12 bytes per parameter (weight and two moments in fp32), a token costs 6 FLOP per parameter
(Kaplan et al. 2020, section 2.1). A CPU does about 6 FLOP in the time of reading a byte, an accelerator about 200."""
_TOKENS_A_LOOK_ELSEWHERE = 2**16
SMALL_BYTES = 2**23
"""A state of no more (adapters, small models) is looked at whole after every update: a third of a millisecond."""


class StateCheck:
    """The look at one port's state, step by step: :meth:`begin`, the update, :meth:`spoilt`, :meth:`end`."""

    def __init__(self, port: ReplayPort, every_updates: int) -> None:
        """``every_updates``: between two whole looks, at most."""
        self.port, self.every_updates = port, every_updates
        self.bad_from_start = frozenset(self.bad_now())
        """State tensors that were bad when the guard came: they cannot be held against an update."""
        self._counted: list[tuple[str, Tensor, int]] = []
        self._written: list[tuple[str, Tensor]] = []
        self._whole, self._tokens_since, self._is_small = True, 0, False

    def begin(self) -> None:
        """A step begins: what was written since the last one ended is to be looked at."""
        self._written = [(name, t) for name, t, version in self._counted if t._version != version]

    @property
    def written(self) -> list[str]:
        """Names of the state tensors that somebody wrote between the last step and this one."""
        return [name for name, _ in self._written]

    def spoilt(self, num_tokens: int) -> list[str]:
        """State tensors that are non-finite or absurdly large after the update, of those that are looked at now.

        Args:
            num_tokens: of the step.
        """
        self._whole = self._is_due(num_tokens)
        if self._whole:
            tensors = list(self.port.state_tensors())
        else:
            tensors = list(self.port.parameters())
            own = {name for name, _ in tensors}
            known = [(name, t) for name, t, _ in self._counted] if self._is_small else self._written
            tensors += [(name, t) for name, t in known if name not in own]
        return [name for name in bad_tensors(tensors, ABSURD) if name not in self.bad_from_start]

    def bad_now(self) -> list[str]:
        """All state tensors that are non-finite or absurdly large."""
        return bad_tensors(self.port.state_tensors(), ABSURD)

    def end(self, *, ordinary: bool) -> None:
        """A step has ended. After an extraordinary one, and now and then, the optimizer may hold other tensors."""
        if ordinary and self._counted and not self._whole:
            self._counted = [(name, t, t._version) for name, t, _ in self._counted]
        else:
            tensors = list(self.port.state_tensors())
            self._is_small = sum(t.nbytes for _, t in tensors if t.layout is torch.strided) <= SMALL_BYTES
            # Inference tensors are not counted.
            self._counted = [(n, t, t._version) for n, t in tensors if not t.is_inference()]

    def _is_due(self, num_tokens: int) -> bool:
        self._tokens_since += num_tokens
        device = next((p.device.type for _, p in self.port.parameters()), "cpu")
        enough = self._tokens_since >= _TOKENS_A_LOOK.get(device, _TOKENS_A_LOOK_ELSEWHERE)
        # The first update makes the moments.
        due = enough or self.port.state.updates <= 1 or self.port.state.updates % self.every_updates == 0
        self._tokens_since = 0 if due else self._tokens_since
        return due
