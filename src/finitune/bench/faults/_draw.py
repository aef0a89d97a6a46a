"""What several faults draw: magnitudes, elements of the state, and tokens that come up rarely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from torch import nn

from finitune.bench.workload import Workload


def log_uniform(random: Random, low: float, high: float) -> float:
    """A number between two positive ones, every magnitude as likely as any other."""
    return math.exp(random.uniform(math.log(low), math.log(high)))


def sign(random: Random) -> float:
    """-1 or 1."""
    return random.choice((-1.0, 1.0))


def spelled(value: float) -> str:
    """A number as a sentence has it."""
    return f"{value:.3g}"


def matrices(load: Workload, *, trained: bool | None = None) -> list[tuple[str, nn.Parameter]]:
    """Weights of two or more dimensions inside the decoder layers; trained ones, frozen ones, or all of them."""
    inside = f"{load.decoder}.layers."
    named = [(n, p) for n, p in load.model.named_parameters() if n.startswith(inside) and p.dim() > 1]
    return [(n, p) for n, p in named if trained is None or p.requires_grad is trained]


def element(random: Random, named: Sequence[tuple[str, nn.Parameter]]) -> tuple[str, nn.Parameter, int]:
    """One of these parameters and the place of an element in it, flat."""
    name, parameter = random.choice(list(named))
    return name, parameter, random.randrange(parameter.numel())


def short(name: str) -> str:
    """A parameter's or module's name without what adapters put before it."""
    return name.removeprefix("base_model.model.")


def first_steps(load: Workload) -> dict[int, int]:
    """By token, the first step (from 1) with a row that holds it."""
    found: dict[int, int] = {}
    for step in range(1, len(load.batches) + 1):
        for ids in load.row_ids(step):
            for token in ids.tolist():
                found.setdefault(int(token), step)
    return found


def rows_with(load: Workload, token: int) -> list[str]:
    """Names of the rows that hold a token, in the order in which they come up."""
    names: dict[str, None] = {}
    for step, here in enumerate(load.rows, 1):
        for name, ids in zip(here, load.row_ids(step), strict=True):
            if token in ids.tolist():
                names[name] = None
    return list(names)


def late_token(load: Workload, random: Random, *, early: float = 0.08, late: float = 0.6) -> tuple[int, int]:
    """A token that first comes up in a later step, in few rows, and in none of the held-out ones; and that step."""
    count = len(load.batches)
    held_out = {int(t) for batch in load.held_out for t in batch["input_ids"].unique()}
    seen = first_steps(load)
    late_ones = [t for t, s in sorted(seen.items()) if early * count <= s <= late * count and t not in held_out]
    token = random.choice(late_ones)
    return token, seen[token]


def modules(load: Workload, *parts: str) -> list[str]:
    """Dotted names of the modules inside the decoder layers that are called one of ``parts``, adapted or not."""
    inside = f"{load.decoder}.layers."
    named = [n for n, _ in load.model.named_modules() if n.startswith(inside)]
    return [n for n in named if n.rpartition(".")[2] in parts]


def base(load: Workload, module: str) -> nn.Linear:
    """A linear layer itself, under the adapter that may be wrapped around it."""
    found = load.model.get_submodule(module)
    inner = getattr(found, "base_layer", found)
    assert isinstance(inner, nn.Linear)
    return inner
