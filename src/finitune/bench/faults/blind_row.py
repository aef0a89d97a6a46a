"""E: in the attention mask of one row there are tokens that may attend to nothing.

A mask built by hand, document borders that do not match, or padding on the other side than expected. Plain attention
takes the softmax over -inf alone, which is NaN; the row fails in every batch, in every precision.
Threads: pytorch/pytorch#103749, unslothai/unsloth#9848, deepspeedai/DeepSpeedExamples#571.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from finitune.bench.faults._rows import first_step, twins
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "E"
CASES = (12,)
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """A 4-D mask for eager attention in which one to three tokens of the row are blind."""
    step, row = load.place(random)
    bad, name = load.row_ids(step)[row], load.rows[step - 1][row]
    first_token = random.randrange(len(bad))
    blind = slice(first_token, min(len(bad), first_token + random.randint(1, 3)))
    load.model.config._attn_implementation = "eager"  # type: ignore[union-attr]

    def change(kwargs: dict[str, Any]) -> None:
        mask = additive_mask(kwargs["attention_mask"])
        mask[load.has(kwargs["input_ids"], bad), :, blind] = -torch.inf
        kwargs["attention_mask"] = mask

    load.decoder_inputs(change)
    names = twins(load, bad)
    first = first_step(load, *names)
    return Expected(
        says=f"tokens {blind.start} to {blind.stop - 1} of row {name} attend to nothing, first seen at step {first}",
        step=first,
        codes=("NUM402",),
        places=tuple(("row", n) for n in names),
        remedies=("safe_softmax", "math_attention", "skip_rows"),
        never=("OPT", "SYS", "MOD", "NUM400"),
        data={"row": name, "tokens": [blind.start, blind.stop]},
    )


def additive_mask(real_BT: Tensor, lowest: float = torch.finfo(torch.float32).min) -> Tensor:
    """0 where a token may look, ``lowest`` elsewhere, (B, 1, T, T): what is not padding, up to the token itself."""
    width = real_BT.shape[1]
    seen = torch.tril(torch.ones(width, width, dtype=torch.bool))[None, None] & real_BT[:, None, None, :].bool()
    return torch.where(seen, 0.0, lowest)
