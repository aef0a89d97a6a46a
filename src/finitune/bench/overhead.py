"""What the guard costs on a healthy step of a model of usual proportions: a plain loop and a guarded one take turns.

Tiny models say nothing about it: there a step is shorter than the fixed cost of looking at it. Most of the cost is
reading the weights once after the update, which does not grow with the tokens of a step: small steps are the hard case.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from finitune.adapters.bare_guard import guard

WARM = 4
SHAPES = {
    "llama_19m_256_tokens": (2, 128, 40),
    "llama_19m_1024_tokens": (4, 256, 24),
    "lora_19m_512_tokens": (4, 128, 32),
}
"""Rows, tokens a row and steps of each case."""
_RANK = 8


def measure(name: str, seed: int) -> dict[str, Any]:
    """Median over steps of the guarded step's time over the plain one's, in changing order within one process."""
    rows, tokens, steps = SHAPES[name]
    plain, watched = (_model(seed, adapted=name.startswith("lora")) for _ in range(2))
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4, fused=True) for m in (plain, watched)
    ]
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    with guard(watched, optimizers[1], _loss, max_grad_norm=1.0) as guarded:
        for step in range(steps):
            ids_BT = torch.randint(0, plain.config.vocab_size, (rows, tokens), generator=generator)
            batch = {"input_ids": ids_BT, "labels": ids_BT}
            times: dict[str, float] = {}
            for kind in ("plain", "guarded") if step % 2 else ("guarded", "plain"):
                started_s = time.perf_counter()
                if kind == "plain":
                    _plain_step(plain, optimizers[0], batch)
                else:
                    guarded.step(batch)
                times[kind] = time.perf_counter() - started_s
            pairs.append((times["guarded"], times["plain"]))
    ratios = sorted(a / b for a, b in pairs[WARM:])
    return {
        "model": name,
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        "with_snapshots": sum(a for a, _ in pairs[WARM:]) / sum(b for _, b in pairs[WARM:]),
        "plain_step_s": statistics.median(b for _, b in pairs[WARM:]),
        "parameters": sum(p.numel() for p in plain.parameters()),
        "tokens": rows * tokens,
        "steps": steps - WARM,
    }


def _model(seed: int, *, adapted: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=8, num_attention_heads=6)).train()
    if not adapted:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def _loss(model: Any, batch: Any) -> Any:
    return model(**batch, use_cache=False).loss


def _plain_step(model: Any, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    _loss(model, batch).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
