"""N: a row whose input holds a NaN, on the real SmolLM2-135M with LoRA.

The family of nan_row.py; what it draws fits any decoder.
"""

from __future__ import annotations

from finitune.bench.faults.nan_row import CASES, FAULT_CLASS, plant

__all__ = ["CASES", "FAULT_CLASS", "HEAVY", "RUNS", "plant"]

HEAVY = True
RUNS = (("smollm2_lora", "fp32"),)
