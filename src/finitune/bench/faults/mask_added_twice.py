"""E: the lowest number of the format is added twice for what is masked, and the sum is -inf.

One layer of code masks future tokens and padding, another one does it again. finfo.min + finfo.min is -inf; where
everything that a token sees is masked (padding on the left), softmax over -inf alone is NaN. The padding is NaN then,
and by 0 x NaN every real token behind it in the next layer.
Threads: pytorch/pytorch#103749, huggingface/trl#1842, deepspeedai/DeepSpeedExamples#571.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import all_rows, found, in_micro
from finitune.bench.faults.blind_row import additive_mask
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "E"
CASES = (14,)
RUNS = (("llama_sft", "bf16"), ("internlm2_sft", "bf16"), ("llama_sft", "fp32"))
_MOST_ROWS = 12


def plant(load: Workload, random: Random) -> Expected:
    """One to twelve rows come padded on the left; the mask is added twice, in the format of the run."""
    shorter = [n for n in all_rows(load) if any(_padding(load, *at) for at in found(load, n))]
    names = random.sample(shorter, round(log_uniform(random, 1, _MOST_ROWS)))
    padded = [at for at in found(load, *names) if _padding(load, *at)]
    for at in padded:
        _pad_left(load, *at)
    dtype = torch.bfloat16 if load.precision == "bf16" else torch.float32
    load.model.config._attn_implementation = "eager"  # type: ignore[union-attr]

    def change(kwargs: dict[str, Any]) -> None:
        once = additive_mask(kwargs["attention_mask"], torch.finfo(dtype).min).to(dtype)
        kwargs["attention_mask"] = once + once

    load.decoder_inputs(change)
    step = padded[0][0]
    there = [load.rows[step - 1][place] for s, place in padded if s == step]
    return Expected(
        says=f"finfo({dtype}).min added twice; padded on the left are {', '.join(names)}, the first at step {step}",
        step=step,
        codes=("NUM402",),
        places=tuple(("row", name) for name in there),
        remedies=("safe_softmax", "math_attention", "skip_rows"),
        never=("OPT", "SYS", "MOD", "NUM400"),
        data={"rows": names},
    )


def _padding(load: Workload, step: int, place: int) -> int:
    """Padded positions of a row in its batch."""
    micro, index = in_micro(load, step, place)
    return int((micro["attention_mask"][index] == 0).sum())


def _pad_left(load: Workload, step: int, place: int) -> None:
    """Move the padding of a row to the left."""
    micro, index = in_micro(load, step, place)
    padding = _padding(load, step, place)
    for key in ("input_ids", "labels", "attention_mask"):
        micro[key][index] = micro[key][index].roll(padding)
