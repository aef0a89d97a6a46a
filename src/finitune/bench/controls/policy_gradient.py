"""A policy gradient: the loss is noise around zero, of either sign.

At a tenth of the run's rate, as reinforcement learning has it. At the full one 400 steps on answers from a fixed buffer
are no healthy run: from about step 150 on the held-out loss rises, from 2.3 to 14 and more, and ratios reach 1e10.
"""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("policy_gradient", "fp32"), ("policy_gradient", "bf16"))
STEPS = 400
_RATE = 0.1


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """The rate is that of reinforcement learning."""
    load.rate = lambda _updates: _RATE
    return f"{_RATE:g} of the usual rate"
