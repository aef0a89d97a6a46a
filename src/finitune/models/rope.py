"""Dynamic RoPE without a memory.

transformers keeps the longest sequence that a dynamic rotary embedding has seen since the last short one, and goes on
with its frequencies for shorter ones (``modeling_rope_utils.dynamic_rope_update``). So what a step computes would
depend on which steps, evaluations and answers came before it, and no step beyond ``max_position_embeddings`` could be
skipped, redone or resumed exactly. Here every forward pass starts as the first one does: the frequencies are a
function of the sequence at hand.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def forget_lengths(model: nn.Module) -> int:
    """Make every dynamic rotary embedding of a model start afresh with each forward pass; the number of them."""
    found = [m for m in model.modules() if "dynamic" in str(getattr(m, "rope_type", "")) and _resettable(m)]
    for module in found:
        module.register_forward_pre_hook(_reset)
    return len(found)


def _resettable(module: nn.Module) -> bool:
    return all(hasattr(module, n) for n in ("inv_freq", "original_inv_freq", "original_max_seq_len"))


def _reset(module: Any, _args: Any) -> None:
    if module.max_seq_len_cached != module.original_max_seq_len:
        module.max_seq_len_cached = module.original_max_seq_len
        module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
