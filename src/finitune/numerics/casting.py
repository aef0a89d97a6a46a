"""Half-precision weights (and moments) in another dtype, for an experiment or for good, and exactly back.

A model that is half all through ("pure fp16") computes in what its weights are. The Parameter objects stay the same,
so optimizer, hooks and tied weights do not notice: only ``.data`` changes. What is not half (fp32 norms, quantised
weights, step counts) is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

HALF_DTYPES = (torch.float16, torch.bfloat16)

# Adam's count of its own steps is no moment.
_NO_MOMENT = "step"


def half_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of ``model`` that are fp16 or bf16; a shared one once."""
    return [t for t in chain(model.parameters(), model.buffers()) if t.dtype in HALF_DTYPES]


@contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, half parameters and buffers are of ``dtype``; afterwards they have their very storage of before.

    For a computation without an update: what is written to the weights inside is lost. Gradients are dropped at the
    end, for they have the dtype of the inside.
    """
    originals = [(t, t.data) for t in half_tensors(model) if t.dtype != dtype]
    try:
        _drop_gradients(t for t, _ in originals)
        for tensor, data in originals:
            tensor.data = data.to(dtype)
        yield
    finally:
        _drop_gradients(t for t, _ in originals)
        for tensor, data in originals:
            tensor.data = data


class CastWeights:
    """The half weights of a model, with their moments, in a dtype that can be changed while the model trains.

    Going somewhere and coming back without an update in between is the identity, bit for bit, in both directions: the
    storage that was left is kept, and taken again if what is there now is still its image. After an update the values
    are converted. Costs the memory of one more copy of the half weights and moments once they were cast.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer
        self._weights = [_Place(t, t.dtype) for t in half_tensors(model)]
        self._moments: dict[int, _Place] = {}
        self._apart: set[tuple[int, str]] = set()
        """Slots (id of the weight, name) that never had the dtype of their half weight: fp32 moments, say."""

    def to(self, dtype: torch.dtype | None) -> None:
        """Make everything that was half be of ``dtype``; None: what it was. Gradients of what changes are dropped.

        Where memory does not suffice nothing is changed.
        """
        self._find_moments()
        places = [*self._weights, *self._moments.values()]
        moves = [(p, p.home if dtype is None else dtype) for p in places]
        moves = [(p, goal) for p, goal in moves if p.tensor.dtype != goal]
        unchanged = all(p.is_image_of(goal) for p, goal in moves)
        cast = [p.cast(goal, exact=unchanged) for p, goal in moves]
        _drop_gradients(p.tensor for p, _ in moves)
        for (place, _), data in zip(moves, cast, strict=True):
            place.put(data)

    def _find_moments(self) -> None:
        """Those that are there now: they come with the first update, and a restored state may have removed some."""
        found = {}
        for weight in self._weights:
            for slot, moment in _moments_of(self._optimizer, weight.tensor):
                if moment.dtype != weight.tensor.dtype:
                    self._apart.add((id(weight.tensor), slot))
                elif (id(weight.tensor), slot) not in self._apart:
                    found[id(moment)] = self._moments.get(id(moment)) or _Place(moment, weight.home)
        self._moments = found


def cast_weights(model: nn.Module, optimizer: torch.optim.Optimizer | None, dtype: torch.dtype) -> CastWeights:
    """Cast half weights, buffers and moments to ``dtype`` for good; ``.to(None)`` of the result takes it back."""
    cast = CastWeights(model, optimizer)
    cast.to(dtype)
    return cast


class _Place:
    """A tensor object, the dtype it is configured in, and the storages it had in other dtypes."""

    __slots__ = ("home", "left", "tensor")

    def __init__(self, tensor: Tensor, home: torch.dtype) -> None:
        self.tensor, self.home = tensor, home
        self.left: dict[torch.dtype, Tensor] = {}

    def _kept(self, dtype: torch.dtype) -> Tensor | None:
        kept = self.left.get(dtype)
        fits = kept is not None and kept.device == self.tensor.device and kept.shape == self.tensor.shape
        return kept if fits else None

    def is_image_of(self, dtype: torch.dtype) -> bool:
        """The present values are exactly those that the kept ones of ``dtype`` were cast to."""
        kept = self._kept(dtype)
        return kept is not None and _same_bits(kept.to(self.tensor.dtype), self.tensor.data)

    def cast(self, dtype: torch.dtype, *, exact: bool) -> Tensor:
        """The values in ``dtype``, in the storage kept for it if there is one; ``exact``: the kept values."""
        kept = self._kept(dtype)
        if kept is None:
            return self.tensor.data.to(dtype)
        return kept if exact else kept.copy_(self.tensor.data)

    def put(self, data: Tensor) -> None:
        """Make ``data`` the tensor's; what it had is kept, and so is the storage it had at home."""
        here, home = self.tensor.data, self._kept(self.home)
        self.left = {} if home is None or data.dtype == self.home else {self.home: home}
        self.left[here.dtype] = here
        self.tensor.data = data


def _moments_of(optimizer: torch.optim.Optimizer | None, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's slots for one weight that are shaped like it."""
    if optimizer is None or weight not in optimizer.state:
        return
    for slot, value in optimizer.state[weight].items():
        if isinstance(value, Tensor) and value.shape == weight.shape and slot != _NO_MOMENT:
            yield slot, value


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits: NaN equals itself, -0 does not equal 0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(whole), b.view(whole))


def _drop_gradients(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None
