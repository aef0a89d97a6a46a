"""What `finitune.guard` costs on a healthy step: a plain PyTorch loop and a guarded one take turns in one process.

    python benchmarks/guard_overhead.py [--steps N] [--model 19m|smollm2]

Same weights, batches and generators; every weight is compared bit for bit at the end. The ratio is taken pair by pair,
in changing order, and its median is quoted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import finitune
from common import median_ratio, quiet, report

WARM = 3
ROWS, TOKENS = 2, 128


def model_of(name: str) -> Any:
    """A model in training mode; the same weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "smollm2":
        from finitune.models.load import load

        return load("SmolLM2-135M-Instruct").model.train()
    config = LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6
    )
    return LlamaForCausalLM(config).train()


def loss_fn(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """The model's own loss."""
    return model(**batch).loss


def batches_of(vocabulary: int, steps: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        ids_BT = torch.randint(0, vocabulary, (ROWS, TOKENS), generator=generator)
        found.append({"input_ids": ids_BT, "labels": ids_BT.clone()})
    return found


def measure(name: str, steps: int) -> dict[str, Any]:
    """The ratio of a guarded step to a plain one."""
    plain, watched = model_of(name), model_of(name)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in (plain, watched)]
    guard = finitune.guard(watched, optimizers[1], loss_fn, max_grad_norm=1.0)
    pairs, taken = [], []
    for step, batch in enumerate(batches_of(plain.config.vocab_size, steps)):
        times: dict[str, float] = {}
        for kind in ("plain", "guarded") if step % 2 else ("guarded", "plain"):
            started_s = time.perf_counter()
            if kind == "plain":
                loss_fn(plain, batch).backward()
                torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
                optimizers[0].step()
                optimizers[0].zero_grad(set_to_none=True)
            else:
                guard.step(batch)
            times[kind] = time.perf_counter() - started_s
        pairs.append((times["guarded"], times["plain"]))
        taken.append(times["plain"])
    guard.close()
    low, middle, high = median_ratio(pairs[WARM:])
    equal = all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    whole = sum(a for a, _ in pairs[WARM:]) / sum(b for _, b in pairs[WARM:])
    return {
        "case": name,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "plain step (s)": statistics.median(taken[WARM:]),
        "guarded / plain (median)": middle,
        "least": low,
        "greatest": high,
        "with snapshots (sum / sum)": whole,
        "bit-equal": equal,
        "steps": steps - WARM,
    }


def main() -> None:
    """Measure, print, keep."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--steps", type=int)
    asked.add_argument("--model", choices=("19m", "smollm2"))
    given = asked.parse_args()
    quiet()
    names = [given.model] if given.model else ["19m", "smollm2"]
    rows = [measure(name, given.steps or (120 if name == "19m" else 40)) for name in names]
    report("guard_overhead", rows, [f"{ROWS} x {TOKENS} tokens a step, fused AdamW, clipping at 1.0."])


if __name__ == "__main__":
    main()
