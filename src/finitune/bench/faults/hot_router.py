"""Q: a router sends everything to one expert.

What happens in the field: a router bias that was never initialised, or a balance loss without a gradient. No number is
bad; the other experts learn nothing, the hot one does all the work. Threads: NVIDIA-NeMo/Automodel#1408,
huggingface/transformers#45120, huggingface/transformers#28205.
"""

from __future__ import annotations

from random import Random
from typing import Any

from torch import Tensor, nn

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "Q"
CASES = ()
RUNS = (("mixtral", "fp32"), ("mixtral", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """One channel, which is 1 for every token, carries a bias of 5 to 50 to one expert's logit."""
    step, _ = load.place(random, 0.05, 0.4)
    gate = f"{random.choice(load.layers)}.mlp.gate"
    module: Any = load.model.get_submodule(gate)
    expert, bias = random.randrange(module.weight.shape[0]), _draw.log_uniform(random, 5.0, 50.0)

    def biased(_module: nn.Module, args: Any) -> Any:
        if load.step < step:
            return None
        # x + b w / |w|^2 adds b to the logit w.x of this expert.
        row_D: Tensor = module.weight.detach()[expert]
        return (args[0] + (bias * row_D / row_D.pow(2).sum()).to(args[0].dtype), *args[1:])

    module.register_forward_pre_hook(biased)
    return Expected(
        says=f"from step {step} on the logit of expert {expert} in {gate} is {_draw.spelled(bias)} higher",
        step=step,
        codes=("MOD403", "MOD117"),
        places=(("module", gate), ("parameter", f"{gate}.weight")),
        remedies=("none", "halt"),
        never=("DAT", "NUM4", "SYS", "OPT"),
        reference="",
        data={"step": step, "module": gate, "expert": expert, "bias": bias},
    )
