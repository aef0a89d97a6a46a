"""How large the numbers of a forward pass are, and hooks that know which tokens are in the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.workload import Workload

FP16_MAX = float(torch.finfo(torch.float16).max)


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Largest absolute inputs and outputs of modules by name, of all passes inside."""
    inputs, outputs = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)

    def hook(name: str) -> Any:
        def look(_module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[name] = max(inputs[name], float(args[0].detach().abs().max()))
            outputs[name] = max(outputs[name], float(output.detach().abs().max()))

        return look

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def largest(load: Workload, names: Sequence[str], step: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Largest absolute inputs and outputs of modules in an fp32 forward pass of a step's batch."""
    with torch.no_grad(), watched(load.model, names) as seen:
        for batch in load.micros(step):
            load.loss(load.model, batch)
    return seen


class Tokens:
    """The token ids of the pass at hand, for hooks further inside."""

    def __init__(self, load: Workload) -> None:
        """Looks at what the decoder is called with."""
        self.ids_BT = torch.zeros(0, 0, dtype=torch.long)
        load.decoder_inputs(self._look)

    def _look(self, kwargs: dict[str, Any]) -> None:
        self.ids_BT = kwargs["input_ids"]

    def factor(self, token: int, value: float) -> Tensor | None:
        """(B, T, 1): ``value`` at the places of a token, 1 elsewhere; None where the token is not there."""
        there_BT = self.ids_BT == token
        return torch.where(there_BT, value, 1.0)[..., None] if bool(there_BT.any()) else None
