"""T: one element of a moment of Adam becomes NaN or infinite between two steps.

What happens in the field: the state is hit as the weights are, twice as often, since there is twice as much of it; the
gradients are fine, and the weight is NaN after the next update. An infinite second moment is worse to find: its weight
just never moves again. Threads: microsoft/dion#76, pytorch/torchtitan#951.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "T"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("lora", "fp32"), ("internlm2_sft", "fp16"))
_BY_SCRIPT = 0.5
"""Share of the cases in which a line of the script writes it, which torch counts; memory that fails is not counted."""


def plant(load: Workload, random: Random) -> Expected:
    """One element of a first or second moment is no number any more after a drawn step."""
    step, _ = load.place(random)
    name, parameter, index = _draw.element(random, _draw.matrices(load, trained=True))
    slot, value = random.choice(("exp_avg", "exp_avg_sq")), random.choice((math.nan, math.inf))
    by_script = random.random() < _BY_SCRIPT

    def spoil() -> None:
        moment = load.optimizer.state[parameter][slot]
        (moment if by_script else moment.data).view(-1)[index] = value

    load.between(step, spoil)
    return Expected(
        says=f"{slot} of {name}[{index}] becomes {value} after step {step}{'' if by_script else ', unseen by torch'}",
        step=step + 1,
        codes=("SYS403",),
        places=(("moment", f"{name}|{slot}"), ("parameter", name)),
        remedies=("repair_tensor", "reset_moments", "roll_back", "retry"),
        never=("DAT", "OPT", "NUM4", "MOD"),
        data={"step": step, "parameter": name, "slot": slot, "index": index, "value": str(value)},
    )
