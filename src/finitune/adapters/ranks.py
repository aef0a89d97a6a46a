"""The ranks of a guarded script: small messages between them, as plain numbers and JSON.

Nothing is pickled. A message is a tensor of fp64 numbers, or JSON as bytes; tensors of the state travel as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from finitune.adapters.codes import BAD_ARGUMENT
from finitune.adapters.codes_ranks import SHARDED
from finitune.core.errors import UserError

_ON_THE_HOST = "gloo"


class Ranks:
    """One process group. Every method but the properties is a collective: all ranks call it, in the same order."""

    def __init__(self, group: Any, device: torch.device) -> None:
        """``group`` None: the default one. ``device``: where messages are made for a backend of accelerators."""
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._device = torch.device("cpu") if dist.get_backend(group) == _ON_THE_HOST else device

    @torch.no_grad()
    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, by rank; as many on each of them."""
        with _disable_current_modes():
            own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
            return torch.stack(self._all(own)).tolist()

    @torch.no_grad()
    def gather_tensor(self, own: Tensor) -> list[Tensor]:
        """A tensor of every rank, all of one shape and dtype, on the device of the own one."""
        with _disable_current_modes():
            return [t.to(own.device) for t in self._all(own.detach().to(self._device).contiguous())]

    def _all(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self._group)
        return found

    @torch.no_grad()
    def gather_json(self, record: Any) -> list[Any]:
        """The records of all ranks, by rank."""
        return [self.share(record, source) for source in range(self.size)]

    @torch.no_grad()
    def share(self, record: Any, source: int) -> Any:
        """The record of one rank on all of them; what the others give is not looked at."""
        with _disable_current_modes():
            content = json.dumps(record, default=str).encode() if self.rank == source else b""
            size = torch.tensor([len(content)], dtype=torch.int64, device=self._device)
            self._broadcast(size, source)
            told = torch.zeros(int(size), dtype=torch.uint8, device=self._device)
            if self.rank == source and content:
                told.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            self._broadcast(told, source)
            return json.loads(bytes(told.cpu().tolist()).decode())

    @torch.no_grad()
    def share_tensor(self, tensor: Tensor, source: int) -> Tensor:
        """A tensor of one rank on all of them, on the device of the own one, which has to be of its shape and dtype."""
        with _disable_current_modes():
            sent = tensor.detach().to(self._device).contiguous().clone()
            flat = sent.reshape(-1).view(torch.uint8)  # NaN payloads and -0 travel as bits
            self._broadcast(flat, source)
            return sent.to(tensor.device)

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        if tensor.numel():
            place = source if self._group is None else dist.get_global_rank(self._group, source)
            dist.broadcast(tensor, place, group=self._group)


def ranks_of(model: nn.Module, wanted: Any) -> Ranks | None:
    """The ranks that a script trains on; None for one process.

    Args:
        model: as the loss function calls it.
        wanted: None: the group of DistributedDataParallel, else the default one, where one of several processes is
            initialised; True: the same, which then has to be there; False: none; or a process group.

    Raises UserError DST414 for sharded weights, SYS425 for what is no group.
    """
    there = dist.is_available() and dist.is_initialized()
    if wanted is not None and not isinstance(wanted, bool) and not (there and isinstance(wanted, dist.ProcessGroup)):
        raise _bad(f"a {type(wanted).__name__} is no process group that is initialised")
    if wanted is True and not there:
        raise _bad("torch.distributed is not initialised")
    own: Any = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None
    if wanted is False and there and own is not None and dist.get_world_size(own) > 1:
        raise _bad("False, and DistributedDataParallel exchanges gradients: a replay on one rank would wait for ever")
    if wanted is False or not there:
        return None
    group: Any = own if wanted in (None, True) else wanted
    if dist.get_world_size(group) < 2:
        return None
    sharded = [n for n, p in model.named_parameters() if type(p.data).__name__ == "DTensor"]
    if sharded:
        raise UserError(SHARDED, sharded[0], name=sharded[0], count=len(sharded))
    return Ranks(group, next(p.device for p in model.parameters()))


def _bad(problem: str) -> UserError:
    cure = "call torch.distributed.init_process_group first, and leave ranks=None"
    return UserError(BAD_ARGUMENT, "finitune.guard", name="ranks", problem=problem, cure=cure)


def inner_of(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel: its names are those that a script knows."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def largest(values: Sequence[float]) -> int:
    """The place of the largest value; one that is not finite counts as larger, the first of several."""
    bad = [i for i, v in enumerate(values) if not abs(v) < float("inf")]
    return bad[0] if bad else max(range(len(values)), key=lambda i: (values[i], -i))


def same_bits(values: Sequence[float]) -> bool:
    """All the same number; NaN is NaN."""
    return all(v == values[0] or (v != v and values[0] != values[0]) for v in values)
