"""T: one element of the second moment of Adam becomes negative between two steps.

What happens in the field: the sign bit of a moment flips, or a shard of the state is read back from the wrong place. No
number of the state is NaN; its root is, and so is the weight after the next update.
Threads: microsoft/dion#76, NVIDIA-NeMo/Automodel#763.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "T"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("lora", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """One second moment becomes 1 to 1e6 times the largest of its tensor, below zero, after a drawn step."""
    step, _ = load.place(random)
    name, parameter, index = _draw.element(random, _draw.matrices(load, trained=True))
    factor = _draw.log_uniform(random, 1.0, 1e6)

    def spoil() -> None:
        second = load.optimizer.state[parameter]["exp_avg_sq"]
        # Where all is 0, the smallest that the next gradient does not lift above it.
        second.view(-1)[index] = -factor * max(float(second.max()), 1e-12)

    load.between(step, spoil)
    return Expected(
        says=f"exp_avg_sq of {name}[{index}] is {_draw.spelled(factor)} times the largest, negative, after step {step}",
        step=step + 1,
        codes=("SYS403",),
        places=(("moment", f"{name}|exp_avg_sq"), ("parameter", name)),
        remedies=("repair_tensor", "reset_moments", "roll_back", "retry"),
        never=("DAT", "OPT", "NUM4", "MOD"),
        data={"step": step, "parameter": name, "index": index, "factor": factor},
    )
