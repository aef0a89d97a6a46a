"""C: the loss scale starts so high that the scaled gradients overflow for most of the run.

What happens in the field: an initial scale copied from another framework, or 2^60 "to be sure"; the scaler halves once
a step and leaves out every update meanwhile. The loss is finite all the time.
Threads: deepspeedai/DeepSpeed#931, pytorch/pytorch#55585.
"""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "C"
CASES = ()
RUNS = (("llama_sft", "fp16"), ("lora", "fp16"), ("pretrained_sft", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """The scaler starts at 2^40 to 2^100; the run is fine at 2^10."""
    power = random.randint(40, 100)
    load.init_scale = 2.0**power
    return Expected(
        says=f"the loss scale starts at 2^{power}",
        step=1,
        codes=("NUM401", "NUM020", "NUM021"),
        remedies=("scaler_reset", "fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS", "MOD"),
        data={"power": power},
    )
