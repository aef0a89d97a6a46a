"""A replay port with half precision and a loss scale, on a tiny Llama: what experiments need, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from finitune.engine.conditions import Conditions
from finitune.engine.port import WHOLE, Ask, Trace
from finitune.engine.realise import Realiser, clip_norm, widen_batch
from finitune.models.tiny import tiny_llama
from finitune.numerics.half import emulated_half
from finitune.numerics.norms import tensor_norms
from finitune.numerics.seeds import seed_generators
from support.replay_port import BarePort, Batch, LossFn

VOCAB = 64
WIDTH = 16
_SEED = 11


class HalfPort(BarePort):
    """Knows every condition. ``half``: products in emulated fp16. ``scale``: a fixed loss scale."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        batches: Sequence[Sequence[Batch]],
        *,
        half: bool = False,
        scale: float | None = None,
        max_grad_norm: float | None = None,
        schedule: Callable[[int], float] = lambda _step: 1.0,
    ) -> None:
        super().__init__(model, optimizer, loss_fn, batches)
        self.half, self.scale, self.max_grad_norm = half, scale, max_grad_norm
        self.schedule = schedule
        """Factor of the rate at a step (0-based)."""
        self.realiser = Realiser(model, optimizer)
        self.asked: list[tuple[Conditions, Ask]] = []
        """Every computation: under which conditions, of what."""

    @property
    def loss_scale(self) -> float | None:
        return self.conditions.loss_scale or self.scale

    def adopt(self, conditions: Conditions) -> None:
        self.realiser.adopt(conditions)
        self.state.conditions = conditions
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * conditions.lr_factor

    def facts(self) -> Mapping[str, Any]:
        group = self._optimizer.param_groups[0]
        precision = "fp16-emulated" if self.half else "fp32"
        return {
            **super().facts(),
            "precision": precision,
            "attention": "sdpa",
            "adam_eps": group.get("eps"),
            "lr": self._lrs[0],
            "max_grad_norm": self.max_grad_norm,
        }

    def _region(self) -> AbstractContextManager[Any]:
        return emulated_half(torch.float16) if self.half else nullcontext()

    def forward_backward(self, ask: Ask = WHOLE) -> Trace:
        number = self.state.step + 1 if ask.step is None else ask.step
        asked = self._asked(ask)
        self.asked.append((self.conditions, ask))
        total = torch.zeros(())
        for micro, batch in asked:
            batch = widen_batch(batch, self.conditions.extra_padding)
            seed_generators(_SEED, number, micro)
            with self.realiser.forward():
                with self._region():
                    loss = self.loss_fn(self._model, batch) / len(asked)
                (loss * (self.loss_scale or 1.0)).backward()
            total = total + loss.detach().float()
        named = [(n, torch.zeros_like(p) if p.grad is None else p.grad) for n, p in self.parameters()]
        norms_P = tensor_norms([g for _, g in named])
        return Trace(number, total, 1, 1, norms_P, [n for n, _ in named], self._lrs[0], self.loss_scale)

    def commit(self, reading: Any) -> None:
        grads = [p.grad for _, p in self.parameters() if p.grad is not None]
        if self.loss_scale:
            torch._foreach_div_(grads, self.loss_scale)
        limit = clip_norm(self.max_grad_norm, self.conditions)
        if limit is not None:
            nn.utils.clip_grad_norm_([p for _, p in self.parameters()], limit)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            scheduled = lr * self.schedule(self.state.step)
            most = self.conditions.max_lr
            group["lr"] = self.conditions.lr_factor * (scheduled if most is None else min(scheduled, most))
        self._optimizer.step()
        self.abort()
        self.state.updates += 1


def text(num_steps: int, *, rows: int = 4, width: int = WIDTH) -> list[list[dict[str, torch.Tensor]]]:
    """Rows that count up in strides: something to learn."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(num_steps):
        starts_B1 = torch.randint(0, VOCAB - 4, (rows, 1), generator=generator)
        strides_B1 = torch.randint(1, 4, (rows, 1), generator=generator)
        ids_BT = (starts_B1 + strides_B1 * torch.arange(width)) % (VOCAB - 4)
        batches.append([{"input_ids": ids_BT, "labels": ids_BT.clone()}])
    return batches


def causal_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    return loss


def llama(*, layers: int = 2, seed: int = 0) -> nn.Module:
    model = tiny_llama(seed, hidden=32, layers=layers, heads=2, kv_heads=2, mlp=96, vocab=VOCAB, positions=64)
    return model.train()
