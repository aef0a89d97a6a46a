"""Computed buffers: what the configuration gives in place of what the buffers hold, for one replay.

What it changes:
    Buffers that no checkpoint holds (rotary frequencies) and that differ from what their module computes when it is
    built anew from its configuration. They take that value, and are put back.

What each outcome says:
    GOOD: the loss of the same batch does not get worse with them: the buffers were lost, and the configuration is
    right. Of weights that were trained with the right ones it falls; of fresh weights it hardly changes, and whoever
    loads what is trained on them will compute the buffers from the configuration again.
    BAD: the loss rises: the weights were trained with the buffers as they are, and the configuration is what is wrong.

What it costs:
    Two replays; nothing where every buffer is as it should be.

Source:
    https://github.com/meta-pytorch/torchtune/issues/218 ; transformers, ``ROPE_INIT_FUNCTIONS``
"""

from __future__ import annotations

import math
from typing import Any

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.lab import Lab
from finitune.engine.look.codes import BUFFER_DIFFERS
from finitune.engine.look.repair import of_buffers

ORDER = 43
COST = 2.0
SAYS = {
    Result.GOOD: Words(
        "With {first} as the configuration gives it the loss of the same batch is {loss}; it was {was}.",
        "按配置重新计算 {first} 后，同一批的损失为 {loss}，原为 {was}。",
    ),
    Result.BAD: Words(
        "With {first} as the configuration gives it the loss of the same batch rises from {was} to {loss}: the "
        "weights were trained with the buffer as it is.",
        "按配置重新计算 {first} 后，同一批的损失从 {was} 升到 {loss}：权重是在现有 buffer 下训练的。",
    ),
}
NO_WORSE = 0.01
"""Of the loss. It is the same batch with the same randomness: what rises by more has been made worse."""


def wanted(case: Case) -> bool:
    """The look before the first step found such buffers."""
    return case.trigger is Trigger.SILENT and case.finding.code == BUFFER_DIFFERS.code


def run(lab: Lab, case: Case) -> Findings:  # noqa: ARG001
    """The batch at hand with the buffers as they are, and as they should be. Raises NotPossible, BudgetSpent."""
    found = of_buffers(lab.port.model)
    if found is None:
        raise NotPossible("every computed buffer is what the configuration gives")
    was = lab.shoot().reading.loss
    with found.in_place():
        shot = lab.shoot()
    loss = shot.reading.loss
    good = not shot.bad and math.isfinite(loss) and not loss > was * (1.0 + NO_WORSE)
    numbers: dict[str, Any] = {"buffers": list(found.names), "first": found.names[0], "was": was, "loss": loss}
    data = {"what": "not_as_computed", "from_the_start": True, **_shown(found.finding.data)}
    suspects = tuple(Suspect("buffer", name, data if name == found.names[0] else {}) for name in found.names)
    return evidence("computed_buffers", good, **numbers), suspects


def _shown(data: Any) -> dict[str, Any]:
    return {"index": data.get("index"), "value": data.get("found"), "expected": data.get("expected")}
