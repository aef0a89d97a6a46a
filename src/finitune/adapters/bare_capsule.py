"""What the capsule of a script holds beyond that of a recipe: the states of the random generators, and who trains.

A recipe's run seeds every step by its number; a script's generators are wherever the script has left them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from finitune.adapters import bare_batch
from finitune.adapters.bare_generators import FAULTS, pack, unpack
from finitune.engine.capture import Captured
from finitune.engine.conditions import NotPossible
from finitune.numerics.seeds import GeneratorStates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finitune.adapters.bare import BarePort
    from finitune.engine.capsule_read import Capsule

_STATES, _MODES = "states", "modes"
# Of capsule.json, which may have 16 MiB; some 5 kB for each micro-batch are usual.
_MOST_CHARS = 8 << 20


def with_script(captured: Captured, port: BarePort) -> Captured:
    """The same with what only a script's capsule needs; batches of any kind become plain nests."""
    return replace(
        captured,
        micros=tuple(bare_batch.plain(m) for m in captured.micros),
        generators={**captured.generators, **_packed_generators(port, captured.step)},
        kernels={**captured.kernels, _MODES: modes(port.model)},
    )


def _packed_generators(port: BarePort, step: int) -> dict[str, str]:
    try:
        states = port.held.at(step).states
    except NotPossible:
        return {}
    text = json.dumps(pack(states)) if states else ""
    return {_STATES: text} if 0 < len(text) <= _MOST_CHARS else {}


def generators_of(capsule: Capsule) -> tuple[GeneratorStates, ...]:
    """The states before each micro-batch; empty where there are none that can be used."""
    found = capsule.info.get("generators")
    text = found.get(_STATES) if isinstance(found, Mapping) else None
    if not isinstance(text, str):
        return ()
    try:
        return unpack(json.loads(text))
    except (*FAULTS, RecursionError):
        return ()


# -- which modules train ----------------------------------------------------------------------------------------------


def modes(model: nn.Module) -> dict[str, Any]:
    """Whether the model is in training mode, and the modules that are not as it is."""
    return {"training": model.training, "others": [n for n, m in model.named_modules() if m.training != model.training]}


@contextmanager
def modes_as_in(capsule: Capsule, model: nn.Module) -> Iterator[None]:
    """Inside, each module trains or not as it did then; afterwards as before."""
    kernels = capsule.info.get("kernels")
    found = kernels.get(_MODES) if isinstance(kernels, Mapping) else None
    was = [(m, m.training) for m in model.modules()]
    try:
        if isinstance(found, Mapping) and isinstance(found.get("training"), bool):
            others = {n for n in found.get("others") or () if isinstance(n, str)}
            for name, module in model.named_modules():
                module.training = found["training"] != (name in others)
        yield
    finally:
        for module, training in was:
            module.training = training
