"""Next-token cross entropy, with the output head computed only where there is a target.

On instruction data more than half of the positions carry no target, and the logits of a small
vocabulary-heavy model are its largest tensors. Here the hidden states of supervised positions are
gathered first, and head and loss run over them in chunks, so that no full logits tensor exists. The
gradient of a chunk is made while its logits are at hand: nothing is computed twice.

Loss and gradients are those of ``cross_entropy(head(hidden)[targets])`` (sum over targets, fp32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Computed:
    """Loss of one micro-batch.

    ``loss_sum``: () fp32, detached, unscaled. ``scaled``: () fp32 with graph, loss_sum * factor; None
    where the micro-batch has no target, so that there is nothing to run backward through.
    """

    loss_sum: torch.Tensor
    scaled: torch.Tensor | None
    num_targets: int


def compute(model: nn.Module, family: Any, batch: Any, *, factor: float, chunk_tokens: int) -> Computed:
    """Loss of one micro-batch.

    Args:
        model: a causal language model, perhaps wrapped by peft.
        family: the model family record (gives ``backbone`` and ``head``).
        batch: a Batch; ``labels_BT`` are aligned with ``ids_BT`` (not shifted), -100 = no target.
        factor: what backward is to be scaled by (loss scale / supervised tokens of the step).
        chunk_tokens: positions a chunk of the head.
    """
    hidden_BTD = family.backbone(model)(
        input_ids=batch.ids_BT,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids_BT,
        use_cache=False,
    )[0]
    hidden_ND, targets_N = gather_targets(hidden_BTD, batch.labels_BT)
    head = family.head(model)
    if targets_N.numel() == 0:
        return Computed(torch.zeros((), device=hidden_BTD.device), None, 0)
    # A head with hooks (an island of fp32) must be called to take effect.
    if type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks):
        total, scaled = _FusedHead.apply(  # type: ignore[no-untyped-call]
            hidden_ND, head.weight, head.bias, targets_N, factor, chunk_tokens
        )
        return Computed(total.detach(), scaled, targets_N.numel())
    total = _any_head(head, hidden_ND, targets_N, chunk_tokens)
    return Computed(total.detach(), total * factor, targets_N.numel())


def gather_targets(hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (N, D) of the positions that predict a target, and the target ids (N,)."""
    shifted_BT = labels_BT[:, 1:]
    where_N = (shifted_BT != IGNORED).reshape(-1).nonzero().squeeze(1)
    flat_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    return flat_ND.index_select(0, where_N), shifted_BT.reshape(-1).index_select(0, where_N)


class _FusedHead(torch.autograd.Function):
    """Linear head + summed cross entropy; gradients are made chunk by chunk in the forward pass.

    Matrix products run under the ambient compute context (autocast or emulated half), so that they
    overflow where the plain head would; log-softmax and the sum are fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        factor: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_VD = grad_V = cast_VD = None
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_CV = F.linear(hidden_ND[rows], weight_VD, bias_V)
            half = logits_CV.dtype
            loss, slope_CV = _loss_and_slope(logits_CV, targets_N[rows], factor)
            del logits_CV
            total += loss
            if grad_ND is not None:
                cast_VD = weight_VD.to(half) if cast_VD is None else cast_VD
                grad_ND[rows] = torch.mm(slope_CV, cast_VD).to(grad_ND.dtype)
            if need_weight:
                grad_VD = _add_product(grad_VD, slope_CV.t(), hidden_ND[rows].to(half))
            if need_bias:
                column_V = slope_CV.float().sum(0)
                grad_V = column_V if grad_V is None else grad_V + column_V
        ctx.save_for_backward(grad_ND, grad_VD, grad_V)
        ctx.dtypes = (weight_VD.dtype, bias_V.dtype if bias_V is not None else None)
        ctx.mark_non_differentiable(total)
        return total, total * factor

    @staticmethod
    def backward(ctx: Any, _total: Any, slope: torch.Tensor) -> Any:
        grad_ND, grad_VD, grad_V = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        if not (slope.device.type == "cpu" and slope.item() == 1.0):
            # In place: backward runs once through this node, and a copy of (V, D) is the largest tensor around.
            for gradient in (grad_ND, grad_VD, grad_V):
                if gradient is not None:
                    gradient.mul_(slope)
        return (
            grad_ND,
            None if grad_VD is None else grad_VD.to(weight_dtype),
            None if grad_V is None else grad_V.to(bias_dtype),
            None,
            None,
            None,
        )


def _loss_and_slope(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss () fp32, and factor * d loss / d logits (C, V) in the dtype of the logits."""
    logp_CV = torch.log_softmax(logits_CV.float(), dim=-1)
    loss = -logp_CV.gather(1, targets_C.unsqueeze(1)).sum()
    slope_CV = logp_CV.exp_()
    slope_CV[torch.arange(targets_C.numel(), device=targets_C.device), targets_C] -= 1.0
    return loss, slope_CV.mul_(factor).to(logits_CV.dtype)


def _add_product(total_VD: torch.Tensor | None, left_VC: torch.Tensor, right_CD: torch.Tensor) -> torch.Tensor:
    """``total + left @ right`` in fp32; the product itself in the dtype of its factors."""
    if total_VD is None:
        return torch.mm(left_VC, right_CD).float()
    if right_CD.dtype == torch.float32 and not torch.is_autocast_enabled(right_CD.device.type):
        return total_VD.addmm_(left_VC, right_CD)
    return total_VD.add_(torch.mm(left_VC, right_CD))


def _any_head(head: nn.Module, hidden_ND: torch.Tensor, targets_N: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
    """Chunked loss for a head that is not a plain linear layer (an adapter on it); recomputed in backward."""

    def part(h_CD: torch.Tensor, t_C: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(h_CD).float(), t_C, reduction="sum")

    # A recomputation would leave hooks out (an island of fp32), and run outside of an emulation.
    once = bool(head._forward_hooks or head._forward_pre_hooks) or torch._C._len_torch_function_stack() > 0
    chunks = zip(torch.split(hidden_ND, chunk_tokens), torch.split(targets_N, chunk_tokens), strict=True)
    losses = [part(h, t) if once else checkpoint(part, h, t, use_reentrant=False) for h, t in chunks]
    return torch.stack(losses).sum()
