"""fp16 with a loss scale that starts far too high: the first updates are skipped until the scale has come down."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp16"), ("internlm2_sft", "fp16"))
STEPS = 500


def plant(load: Workload, random: Random) -> str:
    """The scale begins at 2^17 to 2^24."""
    power = random.randint(17, 24)
    load.init_scale = 2.0**power
    return f"the loss scale begins at 2^{power}"
