"""V: the script hides a NaN: a loss that is not finite is replaced by zero, and the log looks healthy.

What happens in the field: a loop that must not stop, or processes that must not wait for each other, put a zero in
place of the loss. With a tensor without a graph, or the parameters times zero, nothing happens to the weights; the rows
of such steps teach nothing in any epoch, and nobody hears of the cause. With nan_to_num the loss is 0 as well, but its
backward pass goes through the NaN: the gradients show it, and so does the row.
Threads: huggingface/trl#6702, ecmwf/WeatherGenerator#2724, epfLLM/Megatron-LLM#33.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from finitune.bench.faults._rows import embedding, first_step, twins
from finitune.bench.workload import Batch, Expected, Workload

FAULT_CLASS = "V"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"), ("lora", "fp32"))


def _without_graph(_loss: Tensor, model: Any) -> Tensor:
    return torch.zeros((), device=next(model.parameters()).device, requires_grad=True)


def _times_zero(_loss: Tensor, model: Any) -> Tensor:
    """Keeps the processes of a distributed run in step: every parameter gets a gradient, of zeros."""
    return torch.stack([p.sum() * 0.0 for p in model.parameters() if p.requires_grad]).sum()


def _nan_to_num(loss: Tensor, _model: Any) -> Tensor:
    return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)


_SHOWN = "nan_to_num"
_ZEROS: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "a tensor without a graph": _without_graph,
    "the parameters times zero": _times_zero,
    _SHOWN: _nan_to_num,
}


def plant(load: Workload, random: Random) -> Expected:
    """A number of one row's input is NaN or inf wherever it comes up; which zero stands in for the loss is drawn."""
    step, row = load.place(random)
    bad, name = load.row_ids(step)[row], load.rows[step - 1][row]
    value, zero = random.choice(("nan", "inf")), random.choice(sorted(_ZEROS))
    token, column = random.randrange(len(bad)), random.randrange(8)

    def spoil(kwargs: dict[str, Any]) -> None:
        ids_BT = kwargs["input_ids"]
        there_B = load.has(ids_BT, bad)
        if bool(there_B.any()):
            states_BTH = embedding(load.model)(kwargs.pop("input_ids"))
            added_BTH = torch.zeros_like(states_BTH)
            added_BTH[there_B, token, column] = float(value)
            kwargs["inputs_embeds"] = states_BTH + added_BTH

    load.decoder_inputs(spoil)
    told = load.loss

    def hidden(model: Any, batch: Batch) -> Tensor:
        loss = told(model, batch)
        return loss if bool(torch.isfinite(loss)) else _ZEROS[zero](loss, model)

    load.loss = hidden
    names = twins(load, bad)
    first = first_step(load, *names)
    return Expected(
        says=f"{value} in row {name}, first seen at step {first}; the script puts {zero} in place of the loss",
        step=first,
        codes=("DAT401",) if zero == _SHOWN else ("NUM130",),
        places=tuple(("row", n) for n in names) if zero == _SHOWN else (),
        remedies=("skip_rows",) if zero == _SHOWN else (),
        never=("OPT", "SYS", "MOD", "NUM4"),
        reference="clean" if zero == _SHOWN else "",
        data={"row": name, "value": value, "zero": zero},
    )
