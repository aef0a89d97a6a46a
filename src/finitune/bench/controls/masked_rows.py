"""One row in twenty has no supervised token, as after a cut of long prompts; its batches have others that do."""

from __future__ import annotations

from random import Random

from finitune.bench.controls._rows import rows_in
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "bf16"), ("llama_sft", "fp16"))
STEPS = 1000


def plant(load: Workload, random: Random) -> str:
    """The labels of those rows are -100; never those of a whole batch."""
    names = list(rows_in(load))
    masked = set(random.sample(names, len(names) // 20))
    for step, batch in enumerate(load.batches):
        places = [place for place, name in enumerate(load.rows[step]) if name in masked]
        for place in places[: len(load.rows[step]) - 1]:
            batch["labels"][place] = -100
    return f"{len(masked)} of {len(names)} rows without a label"
