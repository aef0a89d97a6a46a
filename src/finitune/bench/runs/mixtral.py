"""Full fine-tuning of a tiny Mixtral: four experts, two of them for each token, and the router's balance in the loss.

Two decoder layers of width 32, AdamW, clipping at 1, four rows a step.
"""

from __future__ import annotations

from typing import Any

import torch

from finitune.bench.runs import _text
from finitune.bench.runs.llama_sft import LR, loss
from finitune.bench.workload import Workload

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
NUM_EXPERTS = 4


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = _mixtral(seed)
    batches, names = _text.epochs(_text.rows_of(seed), steps, seed, _text.collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Workload("mixtral", precision, model, optimizer, loss, batches, names, _text.held_out(seed))


def _mixtral(seed: int) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config: Any = MixtralConfig(
        vocab_size=_text.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        max_position_embeddings=64,
        pad_token_id=_text.PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(config)
