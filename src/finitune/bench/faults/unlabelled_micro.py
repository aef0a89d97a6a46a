"""A: with gradient accumulation, one micro-batch of a step has no supervised token, and its mean loss is NaN.

The other micro-batches are fine, so the step has targets; the mean over nothing makes the sum NaN all the same. The
script takes the model's own mean of each micro-batch.
Threads: huggingface/trl#6668, ymcui/Chinese-LLaMA-Alpaca-2#424.
"""

from __future__ import annotations

from random import Random
from typing import Any

from torch import Tensor

from finitune.bench.faults._rows import found, in_micro
from finitune.bench.workload import Batch, Expected, Workload

FAULT_CLASS = "A"
CASES = ()
RUNS = (("accumulated_sft", "fp32"), ("accumulated_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """The rows of one micro-batch lose their labels, wherever they come up."""
    names = unlabel_one(load, random)
    load.loss = own_mean
    first = next(s for s in range(1, len(load.batches) + 1) if any(_is_empty(m) for m in load.micros(s)))
    return Expected(
        says=f"no label in rows {', '.join(names)}: a micro-batch of step {first} has nothing supervised",
        step=first,
        codes=("DAT400",),
        places=tuple(("row", name) for name in names),
        remedies=("skip_rows", "drop_batch"),
        never=("NUM", "OPT", "MOD", "SYS"),
        reference="",  # what those rows would have taught is lost whatever is done
        data={"rows": names},
    )


def unlabel_one(load: Workload, random: Random) -> list[str]:
    """Take the labels from all rows of one micro-batch; their names."""
    step, place = load.place(random)
    size = len(load.micros(step)[0]["input_ids"])
    names = load.rows[step - 1][place - place % size : place - place % size + size]
    for at, position in found(load, *names):
        micro, index = in_micro(load, at, position)
        micro["labels"][index] = -100
    return names


def own_mean(model: Any, batch: Batch) -> Tensor:
    """The model's mean over the tokens of one micro-batch."""
    mean: Tensor = model(**{k: v for k, v in batch.items() if k != "num_items"}, use_cache=False).loss
    return mean


def _is_empty(micro: Batch) -> bool:
    return not bool((micro["labels"] != -100).any())
