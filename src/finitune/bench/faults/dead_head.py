"""H: the head is zero, or the body is many times too small: the logits are dead.

What happens in the field: a checkpoint with missing or wrongly scaled tensors. The first loss is ln(vocabulary),
exactly or nearly, and stays there while the head is frozen; nothing is NaN. Threads: NVIDIA-NeMo/Automodel#1980,
pytorch/torchtitan#3775.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "H"
CASES = (19,)
RUNS = (("lora", "fp32"), ("lora", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """The frozen head is zero or 1e3 to 1e8 times too small, or all frozen matrices of the layers are 5 to 50 times."""
    kind = random.choice(("zero head", "small head", "small body"))
    head = "base_model.model.lm_head.weight"
    if kind == "small body":
        factor = 1 / _draw.log_uniform(random, 5.0, 50.0)
        places = [n for n, _ in _draw.matrices(load, trained=False)]
    else:
        factor = 0.0 if kind == "zero head" else 1 / _draw.log_uniform(random, 1e3, 1e8)
        places = [head]
    for name in places:
        load.parameter(name).data.mul_(factor)
    return Expected(
        says=f"{kind}: {_draw.short(places[0])} and {len(places) - 1} others times {_draw.spelled(factor)}",
        step=0,
        codes=("MOD111", "MOD118", "MOD400"),
        places=tuple(("parameter", n) for n in places),
        remedies=("halt", "none"),
        never=("DAT", "OPT401", "OPT406", "NUM4", "SYS"),
        reference="",
        data={"kind": kind, "factor": factor},
    )
