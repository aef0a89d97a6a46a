"""E: the embedding row of the padding token is NaN, or infinite, from the start.

Nobody looks at padding, and a mask gives it the weight 0; but 0 x NaN is NaN, so every real token of a padded batch is
NaN behind the first attention. Batches without padding are fine.
Threads: ace-step/ACE-Step-1.5#619, unslothai/unsloth#9848, huggingface/transformers#29219.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import embedding
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "E"
CASES = (13,)
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """From one element to all elements of the row are spoilt before the first step."""
    row = embedding(load.model).weight.data[load.pad_id]
    columns = random.sample(range(len(row)), round(log_uniform(random, 1, len(row))))
    value = random.choice((math.nan, math.inf, -math.inf))
    row[columns] = value
    load.spoil()
    name = "model.embed_tokens.weight"
    first = next(s for s in range(1, len(load.batches) + 1) if _is_padded(load, s))
    return Expected(
        says=f"{len(columns)} elements of the padding row of {name} are {value}; padding from step {first} on",
        step=first,
        codes=("MOD400", "MOD402"),
        places=(("parameter", name),),
        remedies=("repair_tensor", "halt"),
        never=("DAT", "OPT", "NUM400"),
        data={"row": load.pad_id, "columns": columns, "value": str(value)},
    )


def _is_padded(load: Workload, step: int) -> bool:
    return any(bool((micro["attention_mask"] == 0).any()) for micro in load.micros(step))
