"""B: what one projection writes into the residual stream grows with training, until it leaves the range of fp16.

What happens in the field: the largest activation climbs for hundreds of steps towards 65504, mostly at down_proj, and
the run dies in the middle of an epoch; the batch has nothing to do with it. Threads: unslothai/unsloth#4014,
vllm-project/vllm#40290, huggingface/transformers#5651.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.faults import _draw
from finitune.bench.faults._measure import FP16_MAX, watched
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "B"
CASES = ()
RUNS = (("llama_sft", "fp16"), ("internlm2_sft", "fp16"))
_TRIAL = 1e4
"""The factor of the trial run: large enough that the eps of the norms no longer counts, as with the final one."""


def plant(load: Workload, random: Random) -> Expected:
    """All that writes into the stream is c times as large, which the norms take out again; c is from a trial run.

    The trial, in fp32, tells how the largest output of the writers grows; c is such that a drawn step with a new
    largest one is the first beyond 65504.
    """
    writers = _draw.modules(load, "o_proj", "down_proj")
    peaks = _trial(load, writers)
    step, name = _record(peaks, random, len(load.batches))
    earlier = max(max(p.values()) for p in peaks[: step - 1])
    factor = _TRIAL * FP16_MAX / (earlier * peaks[step - 1][name]) ** 0.5
    _enlarge(load.model, load.decoder, writers, factor)
    return Expected(
        says=f"the residual stream is {_draw.spelled(factor)} times as large; {name} passes 65504 at step {step}",
        step=step,
        codes=("NUM400", "NUM031"),
        places=(("module", name),),
        remedies=("fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS", "MOD"),
        reference="fp32",
        data={"module": name, "factor": factor, "step": step},
    )


def _record(peaks: list[dict[str, float]], random: Random, count: int) -> tuple[int, str]:
    """A step (from 1) in the middle of the run that is well above all before it, and the writer that is largest."""
    highest, found = 0.0, []
    for step, peak in enumerate(peaks, 1):
        name = max(peak, key=lambda n: peak[n])
        if peak[name] > 1.02 * highest and 0.15 * count <= step <= 0.7 * count:
            found.append((step, name))
        highest = max(highest, peak[name])
    return random.choice(found)


def _trial(load: Workload, writers: Sequence[str]) -> list[dict[str, float]]:
    """By step, the largest output of each writer in a plain fp32 run at the trial factor."""
    (model, optimizer), peaks = deepcopy((load.model, load.optimizer)), []
    _enlarge(model, load.decoder, writers, _TRIAL)
    model.train()
    for batch in load.batches:
        with watched(model, writers) as (_inputs, outputs):
            torch.autograd.backward(load.loss(model, batch))
        peaks.append(dict(outputs))
        torch.nn.utils.clip_grad_norm_(model.parameters(), load.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peaks


def _enlarge(model: Any, decoder: str, writers: Sequence[str], factor: float) -> None:
    def larger(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output * factor

    for name in (f"{decoder}.embed_tokens", *writers):
        model.get_submodule(name).register_forward_hook(larger)
