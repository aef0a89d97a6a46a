"""N: the reward of one answer is no number.

The reward function returned None or failed, and the table holds NaN. The mean of its group is NaN, and with it the
advantages of all rows of the group: each of these fails, and only one is at fault.
Threads: huggingface/trl#3237, modelscope/ms-swift#8123.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.faults._rows import first_step, found, in_micro
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "N"
CASES = (25,)
RUNS = (("policy_gradient", "fp32"), ("policy_gradient", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """NaN, or infinite, wherever the row comes up."""
    step, row = load.place(random)
    name = load.rows[step - 1][row]
    value = random.choice((math.nan, math.inf, -math.inf))
    for at, place in found(load, name):
        micro, index = in_micro(load, at, place)
        micro["rewards"][index] = value
    first = first_step(load, name)
    return Expected(
        says=f"the reward of row {name} is {value}, first seen at step {first}",
        step=first,
        codes=("DAT401",),
        places=(("row", name),),
        remedies=("skip_rows", "drop_batch"),
        never=("OPT", "SYS", "MOD", "NUM400", "NUM401"),
        data={"row": name, "value": str(value)},
    )
