"""The state of one rank made the state of all: only tensors that differ travel, everything else is compared by sums."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finitune.adapters.bare_compute import moving_buffers
from finitune.adapters.ranks_port import RanksPort
from finitune.numerics.fingerprint import checksum

_FROZEN = "frozen "


class Mirror:
    """Makes the ranks of one port the same; a collective."""

    def __init__(self, port: RanksPort) -> None:
        self.port = port
        self._sent: dict[str, tuple[int, int, int]] = {}
        """By name: identity and count of changes of the tensor when it was last compared, and its sum."""

    def forget(self) -> None:
        """From now on everything is compared again: the script's own code may have written anywhere."""
        self._sent = {}

    @torch.no_grad()
    def send(self, record: dict[str, Any], source: int) -> dict[str, Any]:
        """The state of ``source`` becomes the state of all; ``record`` travels with it. What is sent, on every rank."""
        ranks, port = self.port.ranks, self.port
        is_source = ranks.rank == source
        if is_source:
            record = record | {"state": port.state_record(), "tensors": self.listed()}
        told: dict[str, Any] = ranks.share(record, source)
        here = dict(self.tensors())
        wanted = [] if is_source else [n for n, *what in told["tensors"] if not _same(here.get(n), what)]
        missing = sorted({n for names in ranks.gather_json(wanted) for n in names})
        whole = {n: what for n, *what in told["tensors"]}
        got = {n: ranks.share_tensor(_place_for(here.get(n), whole[n]), source) for n in missing}
        if not is_source:
            self._take(here, got, told)
        return told

    def listed(self) -> list[list[Any]]:
        """Name, dtype, shape and sum of every tensor; a sum is made again only where the tensor was written to."""
        out = []
        for name, tensor in self.tensors():
            known = self._sent.get(name)
            now = (id(tensor), tensor._version)
            total = known[2] if known is not None and known[:2] == now else checksum(tensor)
            self._sent[name] = (*now, total)
            out.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), total])
        return out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The training state, and what nothing trains: a cure may have repaired it."""
        yield from self.port.state_tensors()
        trained = {id(p) for _, p in self.port.parameters()} | {id(b) for _, b in moving_buffers(self.port.model)}
        named = {**dict(self.port.model.named_parameters()), **dict(self.port.model.named_buffers())}
        yield from ((_FROZEN + n, t) for n, t in named.items() if id(t) not in trained)

    def _take(self, here: dict[str, Tensor], got: dict[str, Tensor], told: dict[str, Any]) -> None:
        frozen = {n for n in got if n.startswith(_FROZEN)}
        for name in frozen:
            here[name].copy_(got[name])
        names = [n for n, *_ in told["tensors"] if not n.startswith(_FROZEN)]
        own = {n for n in here if not n.startswith(_FROZEN)}
        if set(got) - frozen or set(names) != own or _text(self.port.state_record()) != _text(told["state"]):
            self.port.restore({n: got[n] if n in got else here[n].clone() for n in names}, told["state"])


def _text(record: Any) -> str:
    return json.dumps(record, default=str, sort_keys=True)


def _same(tensor: Tensor | None, what: list[Any]) -> bool:
    dtype, shape, total = what
    if tensor is None or list(tensor.shape) != shape or str(tensor.dtype).removeprefix("torch.") != dtype:
        return False
    return bool(checksum(tensor) == total)


def _place_for(tensor: Tensor | None, what: list[Any]) -> Tensor:
    dtype, shape = getattr(torch, what[0]), tuple(what[1])
    if tensor is not None and tensor.dtype == dtype and tuple(tensor.shape) == shape:
        return tensor
    return torch.empty(shape, dtype=dtype)
