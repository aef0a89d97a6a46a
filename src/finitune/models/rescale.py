"""A function-preserving rescale of the residual stream: the same model, nearer to or farther from fp16's limit.

RMSNorm does not care about the size of what it normalises: norm(c x) = norm(x), up to its eps. So where everything
that writes into the residual stream (token embedding, ``o_proj``, ``down_proj``) is multiplied by c, every layer reads
the same normalised values and the logits stay. What changes is the size of the stream and of the outputs of those
projections, and so the distance to 65504. It stands for checkpoints whose activations are larger than this one's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finitune.core.errors import UserError
from finitune.models.codes_using import NOT_RESCALED
from finitune.models.family import Family

_WRITERS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
_TRIAL_TOKENS = 16
# The rms eps is felt a little more, or less; anything beyond this is another function.
_TOLERANCE = 0.02


@torch.no_grad()
def rescale_residual(model: nn.Module, family: Family, factor: float) -> None:
    """Multiply what writes into the residual stream by ``factor``, in place; a tied head is untied first.

    Raises UserError MOD041 where the model's answers would change: norms with a bias, other architectures.
    """
    ids_BT = torch.arange(_TRIAL_TOKENS, device=next(model.parameters()).device).unsqueeze(0)
    model.eval()
    before_BTV = model(input_ids=ids_BT).logits.float()
    _untie(model, family)
    writers = [p for name, p in model.named_parameters() if name.endswith(_WRITERS)]
    for weight in writers:
        weight.mul_(factor)
    after_BTV = model(input_ids=ids_BT).logits.float()
    change = float((after_BTV - before_BTV).abs().amax() / before_BTV.abs().amax())
    if not writers or not change <= _TOLERANCE:
        raise UserError(NOT_RESCALED, family.name, factor=factor, family=family.name, change=change)


def _untie(model: nn.Module, family: Family) -> None:
    """Give the head a weight of its own: it reads from the stream and must keep its size."""
    head: Any = family.head(model)
    config: Any = getattr(model, "config", None)
    embeddings = [p for n, p in model.named_parameters() if n.endswith(_WRITERS[0])]
    if not embeddings or getattr(head, "weight", None) is not embeddings[0]:
        return
    head.weight = nn.Parameter(embeddings[0].detach().clone())
    if config is not None:
        config.tie_word_embeddings = False
