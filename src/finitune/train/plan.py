"""What a run will do and why: derived settings, expected time and memory, before anything is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

_FP32_BYTES = 4
# A training step spends about so much of its time in matrix products (measured on 2 CPU cores with
# 6M-135M Llama models); the rest is norms, softmax, rotary embedding, copies.
_GEMM_SHARE = 0.5
# Tensors of hidden and of MLP width that autograd keeps for one decoder layer and token.
_KEPT_HIDDEN, _KEPT_MLP = 12, 4


@dataclass(frozen=True, slots=True)
class Derived:
    """One derived setting and the reason for it."""

    name: str
    value: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes that time and memory follow from."""

    num_parameters: int
    num_trainable: int
    num_body: int
    """Parameters of the decoder layers."""
    num_head: int
    hidden: int
    mlp: int
    layers: int
    vocabulary: int
    micro_tokens: float
    """Padded tokens of an average micro-batch."""
    micro_supervised: float
    accumulation: int
    chunk_tokens: int
    weight_bytes: int = _FP32_BYTES
    checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run derived from its recipe; printed before training and stored in the journal."""

    derived: tuple[Derived, ...]
    total_steps: int
    step_s: float
    memory_bytes: int
    available_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def flops_a_step(work: Workload) -> float:
    """Floating-point operations of one step: 2 a parameter and token forward, the same for the
    gradient of activations, the same again for the gradient of trainable weights (Kaplan et al.,
    arXiv 2001.08361, appendix B). The head counts supervised tokens only.
    """
    trained_share = work.num_trainable / max(1, work.num_parameters)
    passes = 2.0 + min(1.0, trained_share) + (1.0 if work.checkpointing else 0.0)
    body = 2.0 * work.num_body * work.micro_tokens * passes
    head = 2.0 * work.num_head * work.micro_supervised * (2.0 + min(1.0, trained_share))
    return (body + head) * work.accumulation


def memory_bytes(work: Workload) -> int:
    """Weights, gradients and two fp32 moments of what trains, activations, and one chunk of logits (twice)."""
    weights = work.num_parameters * work.weight_bytes
    training = work.num_trainable * _FP32_BYTES * 3
    layers = 1 if work.checkpointing else work.layers
    kept = work.micro_tokens * layers * (_KEPT_HIDDEN * work.hidden + _KEPT_MLP * work.mlp) * _FP32_BYTES
    logits = min(work.chunk_tokens, work.micro_supervised) * work.vocabulary * _FP32_BYTES * 2
    return int(weights + training + kept + logits)


def measured_flops(device: torch.device, work: Workload, budget_s: float = 0.25) -> float:
    """Matrix-product speed of this device on this model's shapes, operations a second (fp32)."""
    rows = max(16, int(work.micro_tokens))
    left = torch.ones(rows, work.hidden, device=device)
    right = torch.ones(work.hidden, max(work.mlp, 1), device=device)
    torch.mm(left, right)
    count, started_s = 0, time.perf_counter()
    while time.perf_counter() - started_s < budget_s:
        torch.mm(left, right)
        count += 1
    if device.type != "cpu":
        torch.zeros(1, device=device).item()  # wait for the device
    return 2.0 * rows * work.hidden * work.mlp * count / (time.perf_counter() - started_s)


def estimate_step_s(device: torch.device, work: Workload) -> float:
    """Expected seconds a step; within about a factor of 1.5 on a quiet machine."""
    return flops_a_step(work) / (measured_flops(device, work) * _GEMM_SHARE)


def available_bytes(device: torch.device) -> int:
    """Free memory where the model will live."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
