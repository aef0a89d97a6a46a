"""LoRA adapters on a frozen base: their second matrix starts at zero."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("lora", "fp32"), ("lora", "bf16"), ("lora", "fp16"))
STEPS = 400


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
