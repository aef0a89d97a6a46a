"""W: a weight is normalised by the length of its rows, as DoRA does, and one row has none.

What happens in the field: pruned or padded output channels have zero rows; magnitude / norm is 0 / 0, NaN from the
first step on, in every precision. Threads: huggingface/peft#2049, meta-pytorch/torchtune#2250.
"""

from __future__ import annotations

from random import Random
from typing import Any

from torch import Tensor, nn

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "W"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("pretrained_sft", "bf16"), ("internlm2_sft", "fp32"))


class RowNorm(nn.Linear):
    """A linear layer of weight-normalised rows: magnitude * W / |W|, without an eps."""

    magnitude_O1: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D)."""
        norm_O1 = self.weight.pow(2).sum(1, keepdim=True).sqrt()
        return nn.functional.linear(x, self.magnitude_O1 * (self.weight / norm_O1), self.bias)


def plant(load: Workload, random: Random) -> Expected:
    """One to three rows of one projection are zero; the layers of that kind are normalised, with their own lengths."""
    module = random.choice(load.projections())
    rows = sorted(random.sample(range(load.weight(module).shape[0]), random.randint(1, 3)))
    load.weight(module)[rows] = 0.0
    for name in load.projections(module.rpartition(".")[2]):
        layer: Any = load.model.get_submodule(name)
        layer.__class__ = RowNorm
        layer.magnitude_O1 = layer.weight.detach().pow(2).sum(1, keepdim=True).sqrt()
    return Expected(
        says=f"rows {', '.join(map(str, rows))} of {_draw.short(module)} are zero, and divided by their norm",
        step=1,
        codes=("NUM405",),
        places=(("module", module), ("parameter", f"{module}.weight")),
        remedies=("halt",),
        never=("DAT", "OPT", "SYS4", "NUM400", "NUM401"),
        reference="",
        data={"module": module, "rows": rows},
    )
