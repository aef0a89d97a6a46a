"""N: the input numbers of one row hold a NaN, as a broken image or a failed preprocessing hands over.

The loss of every batch with that row is NaN, in every epoch; any other batch is fine.
Threads: prs-eth/Marigold#111, TIGER-AI-Lab/MAmmoTH#36.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from finitune.bench.faults._rows import twins
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "N"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """One element of one token's embedding becomes NaN wherever that row comes up."""
    step, row = load.place(random)
    bad, name = load.row_ids(step)[row], load.rows[step - 1][row]
    token, column = random.randrange(len(bad)), random.randrange(8)

    def change(kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        there_B = load.has(ids, bad)
        if not bool(there_B.any()):
            return
        embedded = load.model.get_input_embeddings()(kwargs.pop("input_ids"))  # type: ignore[operator]
        poison = torch.zeros_like(embedded)
        poison[there_B, token, column] = float("nan")
        kwargs["inputs_embeds"] = embedded + poison

    load.decoder_inputs(change)
    names = twins(load, bad)
    first = min(s for s, here in enumerate(load.rows, 1) if set(names) & set(here))
    return Expected(
        says=f"a NaN in the input of row {name}, first seen at step {first}",
        step=first,
        codes=("DAT401",),
        places=tuple(("row", n) for n in names),
        remedies=("skip_rows",),
        never=("OPT", "SYS", "MOD"),
        data={"row": name},
    )
