"""K: a term of the loss has no finite derivative at what one row brings.

The length of a difference that is 0 (sqrt'(0) is infinite), a power of 1/2 of 0, a standard deviation over equal
values, written by hand. The loss is finite and normal; the gradient is NaN, in any precision, wherever the row comes
up.
Threads: MakazhanAlpamys/Soup#342, huggingface/trl#3237.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from torch import Tensor

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import embedding, first_step, twins
from finitune.bench.workload import Batch, Expected, Workload

FAULT_CLASS = "K"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"), ("accumulated_sft", "fp32"))

_SIZES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sqrt": lambda x_BTH: x_BTH.pow(2).sum((1, 2)).sqrt(),
    "power": lambda x_BTH: x_BTH.pow(2).mean((1, 2)) ** 0.5,
    "deviation": lambda x_BTH: (x_BTH - x_BTH.mean((1, 2), keepdim=True)).pow(2).mean((1, 2)).sqrt(),
}


def plant(load: Workload, random: Random) -> Expected:
    """A small penalty on the size of the embedded row; for the row drawn it is taken over an empty span."""
    step, row = load.place(random)
    bad, name = load.row_ids(step)[row], load.rows[step - 1][row]
    kind = random.choice(sorted(_SIZES))
    factor = log_uniform(random, 1e-6, 1e-3)

    def penalty(model: Any, batch: Batch) -> Tensor:
        ids_BT = batch["input_ids"]
        counts_B = ~load.has(ids_BT, bad)
        span_BTH = embedding(model)(ids_BT) * counts_B[:, None, None]
        return factor * _SIZES[kind](span_BTH).mean()

    load.extras.append(penalty)
    names = twins(load, bad)
    first = first_step(load, *names)
    return Expected(
        says=f"{kind} over an empty span of row {name} in the loss, times {factor:.1e}, first seen at step {first}",
        step=first,
        codes=("NUM404",),
        places=tuple(("row", n) for n in names),
        remedies=("skip_rows", "drop_batch"),
        never=("OPT", "SYS", "MOD", "NUM400", "NUM401"),
        data={"row": name, "kind": kind, "factor": factor},
    )
