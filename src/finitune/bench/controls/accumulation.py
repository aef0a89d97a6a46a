"""Gradient accumulation: four micro-batches a step, one update."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("accumulated_sft", "fp32"), ("accumulated_sft", "bf16"))
STEPS = 400


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
