"""A warm-up to a high but sound learning rate, then a cosine down to zero."""

from __future__ import annotations

import math
from random import Random

from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))
STEPS = 700


def plant(load: Workload, random: Random) -> str:
    """The top is one to three times the usual rate."""
    warm, top, steps = random.randint(20, 100), random.uniform(1.0, 3.0), len(load.batches)

    def rate(updates: int) -> float:
        if updates < warm:
            return top * (updates + 1) / warm
        return top * 0.5 * (1 + math.cos(math.pi * (updates - warm) / (steps - warm)))

    load.rate = rate
    return f"warm-up over {warm} steps to {top:.2f} times the usual rate, then a cosine"
