"""I: a learning rate that is far too high from a step on, on the real SmolLM2-135M with LoRA.

The family of rate_jump.py; what it draws fits any decoder.
"""

from __future__ import annotations

from finitune.bench.faults.rate_jump import CASES, FAULT_CLASS, plant

__all__ = ["CASES", "FAULT_CLASS", "HEAVY", "RUNS", "plant"]

HEAVY = True
RUNS = (("smollm2_lora", "fp32"),)
