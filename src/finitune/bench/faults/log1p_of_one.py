"""K: an answer whose log-probability is exactly 0, and the odds p / (1 - p) have a pole there.

ORPO takes log1p(-exp(log p)): at log p = 0 that is log 0 = -inf. An empty answer has the sum 0; a short answer of
which the policy is certain has 0 as well, once 1 - p is below the precision. The loss may even be finite, as
log sigmoid of +inf is 0; its gradient is NaN.
Threads: huggingface/trl#3237, modelscope/ms-swift#8123.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import first_step, found, in_micro, twins
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "K"
CASES = (24,)
RUNS = (("orpo", "fp32"), ("orpo", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """The chosen or the rejected answer of a pair is empty, or the policy is certain of each of its tokens."""
    step, row = load.place(random)
    name = load.rows[step - 1][row]
    side = random.choice(("chosen", "rejected"))
    kind = random.choice(("empty", "certain"))
    if kind == "empty":
        for at, place in found(load, name):
            micro, index = in_micro(load, at, place)
            _side(micro, side)["labels"][index] = -100
    else:
        _certain(load, _answer(load, step, row, side), log_uniform(random, 60, 1e4))
    names = twins(load, load.row_ids(step)[row]) if (side, kind) == ("chosen", "certain") else [name]
    first = first_step(load, *names)
    return Expected(
        says=f"the {side} answer of row {name} is {kind}: log p = 0, first seen at step {first}",
        step=first,
        codes=("NUM404",),
        places=tuple(("row", n) for n in names),
        remedies=("skip_rows", "drop_batch"),
        never=("OPT", "SYS", "MOD", "NUM400", "NUM401"),
        data={"row": name, "side": side, "kind": kind},
    )


def _side(micro: dict[str, Any], side: str) -> dict[str, Tensor]:
    part: dict[str, Tensor] = micro if side == "chosen" else micro["rejected"]
    return part


def _answer(load: Workload, step: int, row: int, side: str) -> Tensor:
    micro, index = in_micro(load, step, row)
    part = _side(micro, side)
    return part["input_ids"][index][part["attention_mask"][index].bool()]


def _certain(load: Workload, ids: Tensor, lead: float) -> None:
    """The logits of the next token of this sequence are so far ahead that the others have the probability 0."""
    seen = [torch.zeros(0, 0, dtype=torch.long)]

    def look(kwargs: dict[str, Any]) -> None:
        seen[0] = kwargs["input_ids"]

    def ahead(_module: nn.Module, _args: Any, logits: Tensor) -> Tensor:
        there_B = load.has(seen[0], ids)
        if not bool(there_B.any()):
            return logits
        more = torch.zeros_like(logits)
        more[there_B, : len(ids) - 1] = lead * nn.functional.one_hot(ids[1:], logits.shape[-1]).to(logits.dtype)
        return logits + more

    load.decoder_inputs(look)
    load.model.get_submodule("lm_head").register_forward_hook(ahead)
