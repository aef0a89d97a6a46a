"""B: a token that drives an MLP beyond the range of fp16, on the real SmolLM2-135M with LoRA.

The family of loud_token.py; what it draws fits any decoder.
"""

from __future__ import annotations

from finitune.bench.faults.loud_token import CASES, FAULT_CLASS, plant

__all__ = ["CASES", "FAULT_CLASS", "HEAVY", "RUNS", "plant"]

HEAVY = True
RUNS = (("smollm2_lora", "fp16"),)
