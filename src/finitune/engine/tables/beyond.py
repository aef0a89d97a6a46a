"""Numbers of a batch that are beyond the table which they are looked up in.

PyTorch raises "index out of range in self", or on a device an assertion; neither says which number of which row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.tables.codes import BEYOND_TABLE

IGNORED = -100
"""Label of a token that does not count in the loss (torch.nn.CrossEntropyLoss)."""
_IDS = ("input_ids", "decoder_input_ids", "ids", "tokens")
_LABELS = ("labels", "targets")
_BESIDES = {"token_type_ids": "token_type", "position_ids": "position", "positions": "position"}
"""Other numbers that are looked up, and what the name of their table has in it."""
_SHOWN = 8
Named = Sequence[tuple[str, Tensor]]


@torch.no_grad()
def beyond_table(micros: Sequence[Named], model: nn.Module) -> Finding | None:
    """DAT115 for the first tensor with numbers beyond its table; None where all fit, or no table is known.

    Reads the batch only; for after a lookup has failed. On a device whose assertion failed nothing can be read any
    more (its error is passed on): hand over what lies on the host.

    Args:
        micros: the tensors of each micro-batch by their path in it, ``[("input_ids", ids_BT), ...]``.
        model: the model as it is called.
    """
    for micro, named in enumerate(micros):
        for name, tensor in named:
            if not tensor.is_floating_point() and tensor.dtype is not torch.bool and tensor.numel():
                for table, num_rows in _tables_of(name, model):
                    beyond = _beyond(name, tensor, num_rows)
                    if bool(beyond.any()):
                        return _finding(name, tensor, beyond, table=table, num_rows=num_rows, micro=micro)
    return None


def _stem(name: str) -> str:
    """``batch.input_ids_BT`` is looked up as ``input_ids``: capitals at the end tell the shape."""
    own = name.rpartition(".")[2]
    stem, _, suffix = own.rpartition("_")
    return stem if stem and suffix.isupper() else own


def _tables_of(name: str, model: nn.Module) -> Iterator[tuple[str, int]]:
    stem = _stem(name)
    if stem in (*_IDS, *_LABELS):
        table = _tokens_table(model)
        if table is not None:
            yield table
    part = _BESIDES.get(stem)
    for path, module in model.named_modules() if part is not None else ():
        if isinstance(module, nn.Embedding) and part in path.rpartition(".")[2].lower():
            yield path, module.num_embeddings


def _tokens_table(model: nn.Module) -> tuple[str, int] | None:
    """The embedding of the tokens: as the model tells; else the only one that it has."""
    try:
        told = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        told = None
    named = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Embedding)]
    found = [(path, m) for path, m in named if m is told] or (named if len(named) == 1 else [])
    return (found[0][0], found[0][1].num_embeddings) if found else None


def _beyond(name: str, tensor: Tensor, num_rows: int) -> Tensor:
    beyond = (tensor < 0) | (tensor >= num_rows)
    return beyond & (tensor != IGNORED) if _stem(name) in _LABELS else beyond


def _finding(name: str, tensor: Tensor, beyond: Tensor, *, table: str, num_rows: int, micro: int) -> Finding:
    places = beyond.nonzero()
    first = tuple(int(i) for i in places[0])
    rows = places[:, 0].unique().tolist() if tensor.dim() else []
    return BEYOND_TABLE.find(
        f"{name}[{', '.join(map(str, first))}]",
        veto=True,
        name=name,
        index=", ".join(map(str, first)),
        value=int(tensor[first]),
        table=table,
        num_rows=num_rows,
        last=num_rows - 1,
        count=len(places),
        row_numbers=", ".join(str(r + 1) for r in rows[:_SHOWN]) or "-",
        row_indices=rows[:_SHOWN],
        micro=micro,
        micro_number=micro + 1,
        fault_class="O",
    )
