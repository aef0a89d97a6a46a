"""T: one weight becomes huge, but stays a number, between two steps.

What happens in the field: a high bit of the exponent flips. Nothing is NaN: the loss jumps, or only moves, and the
whole model trains on around the wrong value. Threads: pytorch/torchtitan#951, microsoft/dion#76.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "T"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("pretrained_sft", "fp32"), ("internlm2_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """One element of a matrix becomes 1e20 to 1e30, of either sign, after a drawn step."""
    step, _ = load.place(random)
    name, parameter, index = _draw.element(random, _draw.matrices(load))
    value = _draw.sign(random) * _draw.log_uniform(random, 1e20, 1e30)

    def spoil() -> None:
        parameter.data.view(-1)[index] = value

    load.between(step, spoil)
    return Expected(
        says=f"{name}[{index}] becomes {_draw.spelled(value)} after step {step}",
        step=step + 1,
        codes=("SYS403",),
        places=(("parameter", name),),
        remedies=("repair_tensor", "roll_back", "retry"),
        never=("DAT", "OPT", "NUM4", "MOD"),
        data={"step": step, "parameter": name, "index": index, "value": value},
    )
