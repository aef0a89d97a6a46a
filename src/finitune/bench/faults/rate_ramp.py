"""I: the warm-up climbs to a learning rate that is far too high.

What happens in the field: nothing is wrong at first; the loss falls, then the gradient norm climbs step by step, and
the run goes over the edge. Threads: haotian-liu/LLaVA#1301, paiml/aprender#2258.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "I"
CASES = ()
RUNS = (("pretrained_sft", "fp32"), ("pretrained_sft", "bf16"), ("lora", "fp32"))
_HIGH = 30.0


def plant(load: Workload, random: Random) -> Expected:
    """The rate grows from that of the run to 300 to 30,000 times, in a line or by a constant factor a step."""
    step, _ = load.place(random, 0.2, 0.4)
    updates_up = random.randint(8, 25)
    factor, line = _draw.log_uniform(random, 300.0, 3e4), random.choice((True, False))

    def rate(updates: int) -> float:
        share = min(1.0, max(0.0, (updates - (step - 1)) / updates_up))
        return 1.0 + (factor - 1.0) * share if line else factor**share

    load.rate = rate
    high = next(s for s in range(1, len(load.batches) + 1) if rate(s - 1) >= _HIGH)
    return Expected(
        says=f"from step {step} on the rate climbs to {_draw.spelled(factor)} times within {updates_up} steps",
        step=high,
        codes=("OPT401",),
        remedies=("lower_lr",),
        never=("DAT", "NUM4", "SYS", "MOD"),
        data={"step": step, "updates_up": updates_up, "factor": factor, "line": line},
    )
