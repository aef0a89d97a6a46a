"""S: half precision was asked for, for another device than the one that computes: everything runs in fp32.

What happens in the field: ``autocast("cuda")`` on an Apple, Ascend or CPU machine is a silent no-op, or a warning in a
long log. The run is slower than it should be, and what it proves about half precision is nothing.
Threads: Stability-AI/stable-audio-3#68, ace-step/ACE-Step-1.5#619.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from random import Random
from typing import Any

import torch

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "S"
CASES = ()
RUNS = (("llama_sft", "bf16"), ("lora", "fp16"), ("llama_sft", "fp16"))
DEVICES = ("cuda", "xpu", "mps", "hpu")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _Elsewhere(Workload):
    """A script whose autocast is for another device."""

    __slots__ = ()

    def context(self) -> AbstractContextManager[Any]:
        """Autocast of a device that does not compute here; which, is kept with the run's name."""
        return torch.autocast(self.run.rpartition("@")[2], _DTYPES[self.precision])


def plant(load: Workload, random: Random) -> Expected:
    """The loss is computed under the autocast of an accelerator; the tensors are on the CPU."""
    device = random.choice(DEVICES)
    load.__class__ = _Elsewhere
    load.run = f"{load.run}@{device}"
    return Expected(
        says=f"{load.precision} was asked for under autocast of {device}; the CPU computes in fp32",
        step=1,
        codes=("SYS402", "SYS440", "SYS441"),
        remedies=("none", "halt"),
        never=("DAT", "OPT", "NUM", "MOD"),
        reference="",
        data={"device": device},
    )
