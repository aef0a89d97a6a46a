"""N: the image of one row holds a NaN or an infinite number.

A broken file, a division by a range of 0 or an unset buffer in preprocessing. The loss of every batch with that row is
NaN, in every epoch; any other batch is fine.
Threads: prs-eth/Marigold#111, TIGER-AI-Lab/MAmmoTH#36.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import first_step, found, in_micro
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "N"
CASES = (28,)
RUNS = (("vl_stub", "fp32"), ("vl_stub", "bf16"), ("vl_stub", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """From one number to all numbers of the row's image become NaN, inf or -inf."""
    step, row = load.place(random)
    name = load.rows[step - 1][row]
    value = random.choice((math.nan, math.inf, -math.inf))
    size = load.micros(step)[0]["pixel_values"][0].numel()
    indices = random.sample(range(size), round(log_uniform(random, 1, size)))
    for at, place in found(load, name):
        micro, index = in_micro(load, at, place)
        micro["pixel_values"][index].view(-1)[indices] = value
    first = first_step(load, name)
    return Expected(
        says=f"{len(indices)} of {size} pixels of row {name} are {value}, first seen at step {first}",
        step=first,
        codes=("DAT401",),
        places=(("row", name),),
        remedies=("skip_rows",),
        never=("OPT", "SYS", "MOD", "NUM"),
        data={"row": name, "value": str(value), "count": len(indices)},
    )
