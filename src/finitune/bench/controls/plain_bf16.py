"""A plain run under bf16 autocast: nothing happens in it."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("llama_sft", "bf16"), ("internlm2_sft", "bf16"))
STEPS = 500


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
