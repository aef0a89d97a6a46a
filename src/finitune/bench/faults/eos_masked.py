"""P: the token that ends an answer is never to be learnt.

The padding token is the end token, and the labels of all padding tokens are masked, the real end among them. The loss
is fine; the model never learns to stop. Only the labels show it.
Threads: unslothai/unsloth#416, InternLM/xtuner#658, huggingface/trl#1623.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from finitune.bench.runs import _text
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "P"
CASES = (32,)
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """Every row ends with an end token, drawn from the unused ones, which is the padding token too."""
    eos = random.randrange(1, _text.FIRST)
    load.batches[:] = [_ended(batch, eos, learnt=False) for batch in load.batches]
    load.held_out[:] = [_ended(batch, eos, learnt=True) for batch in load.held_out]
    load.pad_id = eos
    for name in ("pad_token_id", "eos_token_id"):
        setattr(load.model.config, name, eos)
    return Expected(
        says=f"token {eos} ends every row, pads, and is supervised in none",
        step=1,
        codes=("DAT402", "DAT112", "DAT070"),
        never=("NUM", "OPT", "MOD", "SYS"),
        data={"eos": eos},
    )


def _ended(batch: dict[str, Any], eos: int, *, learnt: bool) -> dict[str, Any]:
    """One column more: the end token behind each row and in all padding; its label is kept or masked."""
    lengths_B1 = batch["attention_mask"].sum(1, keepdim=True)
    ids_BT, mask_BT = F.pad(batch["input_ids"], (0, 1)), F.pad(batch["attention_mask"], (0, 1))
    columns_T = torch.arange(ids_BT.shape[1])
    end_BT = columns_T == lengths_B1
    labels_BT = F.pad(batch["labels"], (0, 1), value=-100)
    return {
        "input_ids": torch.where(columns_T >= lengths_B1, eos, ids_BT),
        "labels": torch.where(end_BT, eos, labels_BT) if learnt else labels_BT,
        "attention_mask": torch.where(end_BT, 1, mask_BT),
    }
