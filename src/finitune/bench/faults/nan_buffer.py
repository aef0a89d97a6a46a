"""T: the buffer of rotary frequencies becomes NaN or infinite between two steps.

What happens in the field: buffers are not trained, not clipped, often not saved, and hardly any guard looks at them;
after a device error or a wrong cast every position is NaN while all weights are fine.
Threads: pytorch/torchtitan#951, meta-pytorch/torchtune#218.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "T"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("lora", "bf16"), ("mixtral", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """One of the frequencies is no number any more after a drawn step."""
    step, _ = load.place(random)
    name = f"{load.decoder}.rotary_emb.inv_freq"
    buffer = load.model.get_buffer(name)
    index, value = random.randrange(buffer.numel()), random.choice((math.nan, math.inf))

    def spoil() -> None:
        buffer.view(-1)[index] = value

    load.between(step, spoil)
    return Expected(
        says=f"{name}[{index}] becomes {value} after step {step}",
        step=step + 1,
        codes=("SYS403",),
        places=(("buffer", name),),
        remedies=("repair_tensor", "roll_back", "retry"),
        never=("DAT", "OPT", "NUM4", "MOD"),
        data={"step": step, "buffer": name, "index": index, "value": str(value)},
    )
