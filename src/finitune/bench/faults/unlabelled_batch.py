"""A: the answers of some rows are gone, and in one step no token at all is supervised.

The prompt filled the whole length and the answer was cut off, or the template was not found: every label of the row is
-100. Where all rows of a batch are such rows (with one row a batch: any of them), the mean loss is 0 / 0 = NaN and
every gradient is exactly 0; a trainer may show 0.0. In other batches the same rows are simply not learnt from.
Threads: huggingface/trl#6668, MakazhanAlpamys/Soup#532, ymcui/Chinese-LLaMA-Alpaca-2#424.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults._rows import first_step, found, in_micro
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "A"
CASES = (1,)
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"), ("llama_sft", "fp16"))
_MOST_STEPS = 3


def plant(load: Workload, random: Random) -> Expected:
    """All rows of one to three steps lose their labels, wherever they come up."""
    steps = sorted({load.place(random)[0] for _ in range(random.randint(1, _MOST_STEPS))})
    names = [name for step in steps for name in load.rows[step - 1]]
    for step, place in found(load, *names):
        micro, index = in_micro(load, step, place)
        micro["labels"][index] = -100
    first = next(s for s, rows in enumerate(load.rows, 1) if set(rows) <= set(names))
    return Expected(
        says=f"no label in {len(set(names))} rows, the first of them at step {first_step(load, *names)}; "
        f"nothing is supervised at step {first}",
        step=first,
        codes=("DAT400", "DAT100"),
        places=tuple(("row", name) for name in load.rows[first - 1]),
        remedies=("drop_batch", "skip_rows", "none"),
        never=("NUM", "OPT", "MOD", "SYS"),
        reference="",  # what those rows would have taught is lost whatever is done
        data={"steps": steps, "rows": names},
    )
