"""N: the image of one row holds a number that is finite and absurdly large.

A buffer that was never written, or a scale applied twice. In fp16 it is infinite as soon as it is cast; in fp32 and
bf16 its square overflows in the first norm. The row fails wherever it comes up; under a loss scaler the step is left
out each time, as if the scale were to blame.
Threads: prs-eth/Marigold#111, TIGER-AI-Lab/MAmmoTH#36.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import first_step, found, in_micro
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "N"
CASES = (28,)
RUNS = (("vl_stub", "fp32"), ("vl_stub", "bf16"), ("vl_stub", "fp16"))
_LOWEST = {"fp32": 1e22, "bf16": 1e22, "fp16": 1e6}
"""Above: smaller numbers do no harm in the format, as the encoder norms what it reads."""
_LARGEST = 3e38


def plant(load: Workload, random: Random) -> Expected:
    """From one number to all numbers of the row's image become huge, of one sign."""
    step, row = load.place(random)
    name = load.rows[step - 1][row]
    value = random.choice((-1.0, 1.0)) * log_uniform(random, _LOWEST[load.precision], _LARGEST)
    size = load.micros(step)[0]["pixel_values"][0].numel()
    indices = random.sample(range(size), round(log_uniform(random, 1, size)))
    for at, place in found(load, name):
        micro, index = in_micro(load, at, place)
        micro["pixel_values"][index].view(-1)[indices] = value
    first = first_step(load, name)
    return Expected(
        says=f"{len(indices)} of {size} pixels of row {name} are {value:.2g}, first seen at step {first}",
        step=first,
        codes=("DAT401",),
        places=(("row", name),),
        remedies=("skip_rows",),
        never=("OPT", "SYS", "MOD"),
        data={"row": name, "value": value, "count": len(indices)},
    )
