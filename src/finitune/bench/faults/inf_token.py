"""H: the embedding row of a token that few rows hold is infinite or NaN from the start.

What happens in the field: rows of added or unused tokens hold what was in memory; the run is fine until such a token
comes up, and then on every row with it. Threads: huggingface/transformers#29219, AnswerDotAI/ModernBERT#96.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "H"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp16"), ("lora", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """The whole row, or one element of it; the token first comes up in a later step."""
    token, step = _draw.late_token(load, random)
    name = f"{load.decoder}.embed_tokens.weight"
    row = load.parameter(name).data[token]
    value, whole = random.choice((math.inf, -math.inf, math.nan)), random.choice((True, False))
    where = slice(None) if whole else random.randrange(row.numel())
    row[where] = value
    load.spoil()
    rows = _draw.rows_with(load, token)
    return Expected(
        says=f"the embedding of token {token} holds {value} from the start; it first comes up at step {step}",
        step=step,
        codes=("MOD400", "MOD402"),
        places=(("parameter", name), *(("row", r) for r in rows)),
        remedies=("repair_tensor", "skip_rows", "drop_batch"),
        never=("DAT", "OPT", "NUM4", "SYS40"),
        data={"token": token, "rows": rows, "value": str(value), "whole": whole},
    )
