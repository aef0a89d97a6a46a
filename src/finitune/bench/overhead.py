"""What the guard costs on a healthy step of a model of usual proportions: a plain loop and a guarded one take turns.

Tiny models say nothing about it: there a step is shorter than the fixed cost of looking at it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from finitune.adapters.bare_guard import guard

STEPS, WARM, ROWS, TOKENS = 28, 4, 2, 128


def measure(name: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Median over steps of the guarded step's time over the plain one's, in changing order within one process."""
    plain, watched = _model(seed), _model(seed)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (plain, watched)]
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    with guard(watched, optimizers[1], _loss, max_grad_norm=1.0) as guarded:
        for step in range(steps):
            ids_BT = torch.randint(0, plain.config.vocab_size, (ROWS, TOKENS), generator=generator)
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
        "steps": steps - WARM,
    }


def _model(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=8, num_attention_heads=6)).train()


def _loss(model: Any, batch: Any) -> Any:
    return model(**batch, use_cache=False).loss


def _plain_step(model: Any, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    _loss(model, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
