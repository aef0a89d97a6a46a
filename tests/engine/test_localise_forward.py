"""A row of zeros in a weight is named where an operation with a pole began the failure, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finitune.engine.localise import localise
from support.replay_port import lab_of
from support.tiny_ports import llama_port

UP = "model.layers.1.mlp.up_proj"


class ByNorm(nn.Linear):
    """Each row of the weight over its length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight / self.weight.pow(2).sum(1, keepdim=True).sqrt())


def found(*zero_rows: int, kind: type[nn.Module] | None = ByNorm, every: bool = False) -> list[Any]:
    """Suspects "parameter" of a step whose up_proj has rows of zeros."""
    port = llama_port()
    module = port.model.get_submodule(UP)
    with torch.no_grad():
        module.weight[list(zero_rows) if not every else slice(None)] = 0.0
    if kind is not None:
        module.__class__ = kind
    else:
        module.register_forward_hook(lambda _m, _a, out: out * float("nan"))
    lab = lab_of(port)
    return [s for s in localise(lab, lab.case) if s.kind == "parameter" and s.data.get("what") == "weight"]


@pytest.mark.parametrize("rows", [(11,), (3, 40)])
def test_rows_without_length_are_named(rows: tuple[int, ...]) -> None:
    [suspect] = found(*rows)
    assert suspect.name == f"{UP}.weight"
    assert (suspect.data["row"], suspect.data["num_rows"], suspect.data["row_amax"]) == (rows[0], len(rows), 0.0)


def test_a_weight_that_is_zero_altogether_was_made_so() -> None:
    assert found(every=True) == []


def test_an_operation_without_a_pole_accuses_no_row() -> None:
    assert found(11, kind=None) == []
