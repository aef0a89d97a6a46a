"""Models that have learnt something before the run begins: there is something to lose."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from finitune.bench.runs import _text
from finitune.models.tiny import tiny_llama

STEPS, LR = 100, 3e-3
_OTHER_ROWS = 5000
"""Added to the seed: the rows of pretraining are not those of the run."""


def pretrained_llama(seed: int) -> Any:
    """The tiny Llama of ``llama_sft`` after 100 plain fp32 steps on other rows of the same kind; trained once."""
    model = _untrained(seed)
    model.load_state_dict(_weights(seed))
    return model


def _untrained(seed: int) -> Any:
    return tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=_text.VOCAB)


@lru_cache(maxsize=32)
def _weights(seed: int) -> dict[str, Tensor]:
    model: Any = _untrained(seed)
    batches, _ = _text.epochs(_text.rows_of(_OTHER_ROWS + seed), STEPS, seed, _text.collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    model.train()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
