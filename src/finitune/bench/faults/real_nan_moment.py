"""T: a moment that is no number any more, on the real SmolLM2-135M with LoRA.

The family of nan_moment.py; what it draws fits any decoder.
"""

from __future__ import annotations

from finitune.bench.faults.nan_moment import CASES, FAULT_CLASS, plant

__all__ = ["CASES", "FAULT_CLASS", "HEAVY", "RUNS", "plant"]

HEAVY = True
RUNS = (("smollm2_lora", "fp32"),)
