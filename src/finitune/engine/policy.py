"""What to do after a verdict: a pure function from the judgement and the history to a decision.

An abort itself changes nothing. What follows it is a decision of its own, journalled:

- the gradients overflowed under a loss scale while the loss is finite: the same batch again at a
  smaller scale (no data is lost), until the retries are spent;
- anything else: give the batch up, keep its row ids, go on with the next;
- too many batches given up in a row: halt with the last good state intact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from finitune.core.robust import History
from finitune.core.types import Judgement, Reading, Verdict


class Action(str, Enum):
    """What the run does after a step was judged."""

    PROCEED = "proceed"
    RETRY_SMALLER_SCALE = "retry_smaller_scale"
    SKIP_BATCH = "skip_batch"
    TREAT = "treat"
    """The step was refused and something is done about the cause; the same batch is computed again."""
    HALT = "halt"


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits of the guard."""

    max_aborts_in_a_row: int = 8


def is_scale_overflow(reading: Reading) -> bool:
    """Gradients overflowed under a loss scale although the loss itself is finite.

    A non-finite *loss* cannot be healed by a smaller scale: the forward pass does not know the scale.
    """
    return reading.loss_scale is not None and math.isfinite(reading.loss) and not math.isfinite(reading.grad_norm)


def decide(judgement: Judgement, reading: Reading, history: History, policy: Policy, *, scale_left: bool) -> Action:
    """The action after a verdict. ``scale_left``: the scaler has a smaller scale to try for this batch."""
    if judgement.verdict is Verdict.COMMIT:
        return Action.PROCEED
    if is_scale_overflow(reading) and scale_left:
        return Action.RETRY_SMALLER_SCALE
    if history.aborts_in_a_row + 1 >= policy.max_aborts_in_a_row:
        return Action.HALT
    return Action.SKIP_BATCH
