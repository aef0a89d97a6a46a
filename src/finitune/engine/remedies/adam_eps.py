"""Adam eps: an eps that exists in the weights' number format.

What it does:
    Replaces the optimizer's eps by the one that the experiment proved (1e-4 for fp16, where 1e-8 is 0).

What it costs:
    Weights whose gradients are smaller than the eps move more slowly; no data, no progress. Where the failure was
    seen only steps after the update that made it, the steps since are computed anew (LOSSY).

When it is taken back:
    It stays.

Source:
    https://github.com/cactus-compute/needle/issues/53 ; Kingma & Ba 2015, "Adam", algorithm 1
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.SAFE
SAYS = Words("Adam's eps is {eps} from now on (before: {was}).", "从现在起 Adam 的 eps 为 {eps}（此前：{was}）。")
ADVICE = Words(
    "Keep the trainable weights in fp32 (precision: fp16 or bf16); if they must be fp16: adam_epsilon: {eps}",
    "可训练权重保持 fp32（precision: fp16 或 bf16）；若必须为 fp16：adam_epsilon: {eps}",
)

_EPS = 1e-4
"""Well above 6e-8, the smallest number of fp16: measured to hold for 200 steps where 1e-6 failed at step 2."""


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """Unless it was tried and is no cure, or one as large is in force; a pair (Adafactor's) is no eps of an Adam."""
    configured = case.facts.get("adam_eps")
    if rungs.is_impossible(case, "adam_eps") or not case.has_half_weights or isinstance(configured, list | tuple):
        return
    eps = rungs.number(case.number("adam_eps", "eps")) or _EPS
    present = rungs.number(now.adam_eps) or rungs.number(configured) or 0.0
    if eps > present:
        back = rungs.before_it_went_bad(case)
        safety = Safety.SAFE if back is None else Safety.LOSSY
        yield rungs.change("adam_eps", safety, now, {"adam_eps": eps}, to_step=back, eps=eps, was=present)
