"""N: two rows of one batch hold a NaN each, independently of one another.

Taking out either of them changes nothing, so that a search that stops at the first culprit clears both. In later
epochs they come up apart.
Threads: prs-eth/Marigold#111, NVIDIA/Megatron-LM#780.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from finitune.bench.faults._rows import embedding, first_step, twins
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "N"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """In two rows of a step, one element of one token's embedding is NaN wherever the row comes up."""
    step, _ = load.place(random)
    rows = random.sample(range(len(load.rows[step - 1])), 2)
    names = [load.rows[step - 1][row] for row in rows]
    bad = [load.row_ids(step)[row] for row in rows]
    spots = [(random.randrange(len(ids)), random.randrange(8)) for ids in bad]

    def change(kwargs: dict[str, Any]) -> None:
        ids_BT = kwargs["input_ids"]
        there = [load.has(ids_BT, row) for row in bad]
        if not any(bool(t.any()) for t in there):
            return
        embedded = embedding(load.model)(kwargs.pop("input_ids"))
        poison = torch.zeros_like(embedded)
        for mine_B, (token, column) in zip(there, spots, strict=True):
            if bool(mine_B.any()):
                poison[mine_B, token, column] = float("nan")
        kwargs["inputs_embeds"] = embedded + poison

    load.decoder_inputs(change)
    everywhere = twins(load, *bad)
    first = first_step(load, *everywhere)
    return Expected(
        says=f"a NaN in the input of each of the rows {names[0]} and {names[1]}, both in step {step}",
        step=first,
        codes=("DAT401",),
        places=tuple(("row", name) for name in everywhere),
        remedies=("skip_rows",),
        never=("OPT", "SYS", "MOD"),
        data={"rows": names, "both_at": step},
    )
