"""A plain run in fp32 from its first step to its last: nothing happens in it."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"))
STEPS = 2000


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
