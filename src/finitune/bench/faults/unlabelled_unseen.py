"""A: with gradient accumulation, rows without labels leave no trace in the log; the data is just not learnt from.

The loss is a sum over the tokens of the whole step divided by their number, so a micro-batch without targets adds 0.
Loss and gradient look healthy; whole rows are lost in every epoch.
Threads: huggingface/trl#6668, MakazhanAlpamys/Soup#532.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults._rows import all_rows, first_step, found, in_micro
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "A"
CASES = (2,)
RUNS = (("accumulated_sft", "fp32"), ("accumulated_sft", "bf16"))
_SHARES = (0.1, 0.5)


def plant(load: Workload, random: Random) -> Expected:
    """A tenth to a half of the rows lose their labels."""
    everything = all_rows(load)
    share = random.uniform(*_SHARES)
    names = random.sample(everything, round(share * len(everything)))
    for step, place in found(load, *names):
        micro, index = in_micro(load, step, place)
        micro["labels"][index] = -100
    for step in range(1, len(load.batches) + 1):
        _count_anew(load, step)
    return Expected(
        says=f"no label in {len(names)} of {len(everything)} rows",
        step=first_step(load, *names),
        codes=("DAT400", "DAT100", "DAT114"),
        places=tuple(("row", name) for name in names),
        never=("NUM", "OPT", "MOD", "SYS"),
        reference="",
        data={"rows": names},
    )


def _count_anew(load: Workload, step: int) -> None:
    """The step's number of targets, as the loader counts it."""
    micros = load.micros(step)
    targets = sum(int((m["labels"][:, 1:] != -100).sum()) for m in micros)
    for micro in micros:
        micro["num_items"].fill_(targets / len(micros))
