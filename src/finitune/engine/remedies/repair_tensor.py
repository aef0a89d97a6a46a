"""Repair a tensor: a corrupt weight, buffer or moment takes its value from the newest state in which it was good.

What it does:
    Copies the good value over the bad one. What nothing trains (a frozen weight, a buffer) comes from the original
    model, what is trained from the last good state of the run, and only if there is none from the original model. The
    row of the padding token, which is never read on purpose, becomes 0 where it had no good value at all.
    Where finite values were changed, the steps since the last state without the change are computed again.
    A computed buffer that was lost before training becomes what its module computes from the configuration; rows of a
    trained vocabulary that are out of all proportion become the mean of the other rows.

What it costs:
    Nothing for a frozen tensor or a buffer; for a trained one the updates since that state, in this tensor only. Back
    to the original model means all that this tensor has learnt, and the mean all that these rows held (LOSSY).

When it is taken back:
    It is not.

Source:
    https://github.com/pytorch/torchtitan/issues/951 ; Hewitt 2021, "Initializing New Word Embeddings for Pretrained
    Language Models"; transformers, ``resize_token_embeddings(mean_resizing=True)`` and ``ROPE_INIT_FUNCTIONS``
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finitune.core.incident import Cause, Safety, Suspect, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Mend, Operation, Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.SAFE
SAYS = Words(
    "{count} tensors take a good value: {names} (from {source}).",
    "{count} 个张量恢复为正常值：{names}（来自 {source}）。",
)
ADVICE = Words(
    "Where it was so from the start: correct the model's files or the code that makes it. If it comes back, look at "
    "the machine's memory.",
    "若从一开始就是如此：修正模型文件或生成它的代码。若再次出现，请检查机器的内存。",
)

_MODEL, _PADDING, _CONFIG, _MEAN = "model", "padding: 0", "config", "mean"


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """What the scan found; from states first, then from the original model. What a redo found: from that redo.

    What a look found before the first step: from the configuration, or from the other rows.
    """
    if case.good("redone_state"):
        yield from _redone(case, now)
        return
    if case.good("computed_buffers"):
        yield _from_elsewhere(rungs.names(case.number("computed_buffers", "buffers")), now, Safety.SAFE, _CONFIG)
    if case.good("mean_rows"):
        yield _from_elsewhere(rungs.names(case.number("mean_rows", "tables")), now, Safety.LOSSY, _MEAN)
    if not case.bad("scan_state"):
        return
    made_now = ("gradient", "update")
    bad = [s for s in case.suspects_of("parameter", "buffer", "moment") if s.data.get("what") not in made_now]
    if not bad:
        return
    first = [(s, None if _is_fixed(s) else rungs.good_step(s)) for s in bad]
    if all(_has_value(s, step) for s, step in first):
        fixed_or_kept = all(step is not None or _is_untrained(s) for s, step in first)
        yield _plan(first, now, Safety.SAFE if fixed_or_kept else Safety.LOSSY)
    if all("padding_row" in s.data for s in bad):
        yield _of_padding(bad, now)
    weights = [(s, None) for s in bad]
    if weights != first and all(s.kind != "moment" for s in bad):
        yield _plan(weights, now, Safety.LOSSY)


def _redone(case: Case, now: Conditions) -> Iterable[Plan]:
    """The steps since the last state without the change are computed again: the run as it should have been."""
    step = rungs.step(case.number("redone_state", "start_step"))
    changed = [s.name for s in case.suspects_of("moment", "parameter") if s.data.get("what") == "changed"]
    if step is not None and changed:
        data = {"count": len(changed), "names": rungs.listed(changed), "source": f"step {step}"}
        yield Plan("repair_tensor", Safety.SAFE, now, to_step=step, data=data)


def _from_elsewhere(names: Sequence[str], now: Conditions, safety: Safety, source: str) -> Plan:
    """Values that neither an earlier state nor the original model has; see :mod:`finitune.engine.look.repair`."""
    data = {"count": len(names), "names": rungs.listed(names), "source": source}
    return Plan("repair_tensor", safety, now, mends=(Mend(Operation.REPAIR, tuple(names)),), data=data)


def _of_padding(bad: Sequence[Suspect], now: Conditions) -> Plan:
    """The row of the padding token, which nobody reads: 0, where the original model has no value for it either."""
    names = tuple(f"{s.name}[{s.data['padding_row']}]" for s in bad)
    data = {"count": len(names), "names": rungs.listed(names), "source": _PADDING}
    return Plan("repair_tensor", Safety.SAFE, now, mends=(Mend(Operation.REPAIR, names),), data=data)


def _plan(sources: Sequence[tuple[Suspect, int | None]], now: Conditions, safety: Safety) -> Plan:
    by_step: dict[int | None, list[str]] = {}
    for suspect, step in sources:
        by_step.setdefault(step, []).append(suspect.name)
    mends = tuple(Mend(Operation.REPAIR, tuple(dict.fromkeys(names)), step) for step, names in by_step.items())
    source = ", ".join(_MODEL if step is None else f"step {step}" for step in by_step)
    names = [s.name for s, _ in sources]
    data = {"count": len(names), "names": rungs.listed(names), "source": source}
    return Plan("repair_tensor", safety, now, mends=mends, data=data)


def _is_fixed(suspect: Suspect) -> bool:
    """Nothing of the run writes it, so the original model has its value, and no snapshot does."""
    return suspect.kind == "buffer" or suspect.data.get("frozen") is True


def _is_untrained(suspect: Suspect) -> bool:
    """Its value in the original model is the one it should have: fixed, or bad before anything was trained."""
    return _is_fixed(suspect) or rungs.step(suspect.data.get("since_step")) in (None, 0)


def _has_value(suspect: Suspect, step: int | None) -> bool:
    """A good value can exist: the original model holds no moments."""
    return suspect.kind != "moment" or step is not None
