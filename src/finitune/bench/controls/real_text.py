"""Real sentences, letter by letter: the docstrings of Python's standard library."""

from __future__ import annotations

from itertools import islice
from random import Random

import torch

from finitune.bench.controls._rows import train_on
from finitune.bench.runs._text import VOCAB
from finitune.bench.workload import Workload
from finitune.data.stdlib import rows

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))
STEPS = 500
_LONGEST = 64


def plant(load: Workload, random: Random) -> str:
    """600 docstrings from a random place on, cut at 64 letters; letters outside of ASCII are one token."""
    start = random.randrange(500)
    taken = [row.fields["docstring"] for row in islice(rows("stdlib"), start, start + 600)]
    letters = [[min(max(ord(c) - 31, 1), VOCAB - 1) for c in " ".join(str(text).split())[:_LONGEST]] for text in taken]
    train_on(load, [torch.tensor(ids) for ids in letters], random.randrange(1000))
    return f"docstrings {start + 1} to {start + 600} of the standard library"
