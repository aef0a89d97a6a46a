"""Attention dropout: every step draws from the global generator, and a guarded run must draw the same."""

from __future__ import annotations

from random import Random

from torch import nn

from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "bf16"))
STEPS = 500


def plant(load: Workload, random: Random) -> str:
    """A share of 5 to 30 % is dropped."""
    share = random.uniform(0.05, 0.3)
    for module in load.model.modules():
        if hasattr(module, "attention_dropout") and isinstance(module, nn.Module):
            module.attention_dropout = share  # type: ignore[assignment]
    return f"attention dropout of {share:.2f}"
