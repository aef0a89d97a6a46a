"""LoRA adapters (peft) on every projection of a pretrained tiny Llama; the base is frozen.

Rank 4, AdamW, clipping at 1, four rows a step. In every precision weights and adapters are stored in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from finitune.bench.runs import _base, _text
from finitune.bench.runs.llama_sft import loss
from finitune.bench.workload import Workload

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR, RANK = 1e-2, 4
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = _adapted(seed)
    batches, names = _text.epochs(_text.rows_of(seed), steps, seed, _text.collate)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Workload(
        "lora",
        precision,
        model,
        torch.optim.AdamW(trained, LR),
        loss,
        batches,
        names,
        _text.held_out(seed),
        decoder="base_model.model.model",
    )


def _adapted(seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    base = _base.pretrained_llama(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=_TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base, config)
