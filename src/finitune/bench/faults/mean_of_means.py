"""L: with gradient accumulation, each micro-batch takes its own mean, so that tokens of short answers weigh more.

A micro-batch with one target counts as much as one with thirty. The loss falls and nothing is NaN; the curve differs
from that of one large batch, and from run to run with how rows fall on micro-batches.
Threads: huggingface/transformers#35438, huggingface/transformers#37766, hiyouga/LlamaFactory#7318.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults._rows import all_rows, found, in_micro
from finitune.bench.faults.unlabelled_micro import own_mean
from finitune.bench.runs.accumulated_sft import micro_batches
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "L"
CASES = (26,)
RUNS = (("accumulated_sft", "fp32"), ("accumulated_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """Rows fall on two to eight micro-batches; of a share of them only the last one to three tokens are learnt."""
    micros, share = random.choice((2, 4, 8)), random.uniform(0.2, 0.8)
    names = [name for name in all_rows(load) if random.random() < share]
    targets = {name: random.randint(1, 3) for name in names}
    for step in range(1, len(load.batches) + 1):
        load.batches[step - 1] = micro_batches(load.row_ids(step), micros)
    for step, place in found(load, *names):
        micro, index = in_micro(load, step, place)
        real = int(micro["attention_mask"][index].sum())
        micro["labels"][index, : real - targets[load.rows[step - 1][place]]] = -100
    load.loss = own_mean
    return Expected(
        says=f"a mean of the means of {micros} micro-batches; {len(names)} rows have one to three targets",
        step=1,
        codes=("OPT403", "OPT112"),
        never=("NUM", "MOD", "SYS", "DAT"),
        reference="",
        data={"micros": micros, "rows": names},
    )
