"""O: one row holds a token id that the embedding has no row for.

Tokens were added to the tokenizer and the model was not resized, or the label of ignored positions stands among the
ids. Looking it up raises an IndexError (on a GPU an assertion that names no row); weights must be those of before.
Threads: huggingface/transformers#29219, AnswerDotAI/ModernBERT#96.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import first_step, found, in_micro
from finitune.bench.runs import _text
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "O"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """One token of the row is beyond the vocabulary, or -100, wherever the row comes up."""
    step, row = load.place(random)
    name = load.rows[step - 1][row]
    place = random.randrange(len(load.row_ids(step)[row]))
    beyond = _text.VOCAB - 1 + round(log_uniform(random, 1, 1e5))
    token = random.choice((beyond, -100))
    for at, position in found(load, name):
        micro, index = in_micro(load, at, position)
        micro["input_ids"][index, place] = token
    first = first_step(load, name)
    return Expected(
        says=f"token {place} of row {name} has the id {token} of {_text.VOCAB}, first seen at step {first}",
        step=first,
        codes=("DAT115", "DAT045", "MOD402"),
        places=(("row", name),),
        remedies=("halt", "skip_rows"),
        never=("OPT", "NUM", "SYS"),
        reference="",
        data={"row": name, "token": token},
    )
