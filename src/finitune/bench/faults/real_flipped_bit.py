"""T: a flipped bit in a weight, on the real SmolLM2-135M with LoRA.

The family of flipped_bit.py; what it draws fits any decoder.
"""

from __future__ import annotations

from finitune.bench.faults.flipped_bit import CASES, FAULT_CLASS, plant

__all__ = ["CASES", "FAULT_CLASS", "HEAVY", "RUNS", "plant"]

HEAVY = True
RUNS = (("smollm2_lora", "fp32"),)
