"""N: one rank of several is handed a row whose input holds a NaN.

The loss of that rank is NaN, the exchange makes the gradients of all ranks NaN, and the other ranks' losses look fine.
Whoever skips on the local loss lets the ranks part, and the run hangs; the exchange itself is not to blame.
Threads: prs-eth/Marigold#111, deepspeedai/DeepSpeed#5347.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from finitune.bench.faults._rows import first_step, twins
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "N"
CASES = (30,)
RUNS = (("gloo_sft", "fp32"),)


def plant(load: Workload, random: Random) -> Expected:
    """One element of one token's embedding becomes NaN wherever that row comes up; first on rank 1."""
    step = random.randint(3, len(load.rows) // 2)
    here = load.rows[step - 1]
    row = random.randrange(len(here) // 2, len(here))
    bad, name = load.row_ids(step)[row], here[row]
    token, column = random.randrange(len(bad)), random.randrange(8)

    def change(kwargs: dict[str, Any]) -> None:
        there_B = load.has(kwargs["input_ids"], bad)
        if bool(there_B.any()):
            embedded = load.model.get_input_embeddings()(kwargs.pop("input_ids"))  # type: ignore[operator]
            poison = torch.zeros_like(embedded)
            poison[there_B, token, column] = float("nan")
            kwargs["inputs_embeds"] = embedded + poison

    load.decoder_inputs(change)
    names = twins(load, bad)
    return Expected(
        says=f"a NaN in the input of row {name}, on rank {int(row >= len(here) // 2)} at step {step}",
        step=first_step(load, *names),
        codes=("DAT401",),
        places=tuple(("row", n) for n in names),
        remedies=("skip_rows",),
        never=("DST", "OPT", "SYS", "MOD", "NUM"),
        data={"row": name, "rank": 1},
    )
