"""O: the rows of new tokens in the output head are far larger than the others.

The vocabulary was extended, and the new rows were drawn from another distribution or copied from a tensor of another
scale. Their logits dwarf all others, so the first loss is far above ln(vocabulary), from the first step on and for
every batch; nothing is NaN. (In the embedding alone the norm behind it takes the scale away again.)
Threads: huggingface/transformers#29219, AnswerDotAI/ModernBERT#96, huggingface/transformers#27114.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults._draw import log_uniform
from finitune.bench.runs import _text
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "O"
CASES = (29,)
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))
_HEAD, _TABLE = "lm_head", "model.embed_tokens"


def plant(load: Workload, random: Random) -> Expected:
    """The last four to twelve tokens are 20 to 2000 times too large, in the head or in head and embedding."""
    count = random.randint(4, 12)
    factor = log_uniform(random, 20, 2000)
    modules = random.choice(((_HEAD,), (_HEAD, _TABLE)))
    for module in modules:
        load.weight(module)[-count:] *= factor
    return Expected(
        says=f"the rows of tokens {_text.VOCAB - count} to {_text.VOCAB - 1} are {factor:.0f} times too large in "
        f"{', '.join(modules)}",
        step=1,
        codes=("MOD402", "MOD113"),
        places=tuple(("parameter", f"{module}.weight") for module in modules),
        remedies=("repair_tensor", "halt"),
        never=("OPT", "DAT", "SYS", "NUM400"),
        data={"count": count, "factor": factor, "modules": list(modules)},
    )
