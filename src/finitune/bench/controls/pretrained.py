"""A model that knows its data already: the loss is low and flat."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("pretrained_sft", "fp32"), ("pretrained_sgd", "fp32"))
STEPS = 500


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
