"""K: a group with a single answer, and the standard deviation of one number is NaN.

num_generations is 1, or the other answers of the group were lost or filtered out. The advantage of the row is
(r - mean) / (std + floor) = NaN; a floor under the deviation does not help. Every batch with the group fails.
Threads: huggingface/trl#3237, modelscope/ms-swift#8123.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults._rows import first_step, found, in_micro
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "K"
CASES = (25,)
RUNS = (("policy_gradient", "fp32"), ("policy_gradient", "bf16"))
_LONE = 1000
"""Number of the first group of one; groups of a batch are numbered from 0."""


def plant(load: Workload, random: Random) -> Expected:
    """One to three rows stand in a group of their own, wherever they come up."""
    names = sorted({_row(load, random) for _ in range(random.randint(1, 3))})
    for at, place in found(load, *names):
        micro, index = in_micro(load, at, place)
        micro["groups"][index] = _LONE + place
    first = first_step(load, *names)
    return Expected(
        says=f"rows {', '.join(names)} are alone in their groups, first seen at step {first}",
        step=first,
        codes=("NUM404",),
        places=tuple(("row", name) for name in names),
        remedies=("skip_rows", "drop_batch"),
        never=("OPT", "SYS", "MOD", "NUM400", "NUM401"),
        data={"rows": names},
    )


def _row(load: Workload, random: Random) -> str:
    step, row = load.place(random)
    return load.rows[step - 1][row]
