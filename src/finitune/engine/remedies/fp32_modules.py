"""fp32 modules: the few modules that leave the range of half precision compute in fp32, the rest stays in half.

What it does:
    First the smallest set that the bisection found. If that relapses: all modules of the same kind that are watched
    (every ``mlp.down_proj``), as activations grow in several layers at once.

What it costs:
    The speed of half precision in these modules only; no data, no progress.

When it is taken back:
    After the probation, once their numbers stand at least one bit below the limit again. After a relapse it stays.

Source:
    Sun et al. 2024, "Massive Activations in Large Language Models"; https://github.com/unslothai/unsloth/pull/4014
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.SAFE
SAYS = Words(
    "Computed in fp32 from now on: {modules}.",
    "从现在起以 fp32 计算：{modules}。",
)
ADVICE = Words(
    "Use precision: bf16 where the device has it, or keep these modules in fp32: {modules}.",
    "设备支持时使用 precision: bf16，或让这些模块保持 fp32：{modules}。",
)

_FEW_BITS = 2.0
"""A module with less headroom than this is worth an island ahead of an overflow."""


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """The set found, then its kind; nothing once both have relapsed."""
    past = rungs.relapses(case, cause, "fp32_modules")
    if now.precision is not None or past > 1 or case.bad("islands"):
        return
    small = _found(case, now)
    larger = (*small, *_same_kind(case, small))
    for modules in (small, larger)[past:]:
        fresh = [m for m in dict.fromkeys(modules) if m not in now.fp32_modules]
        if fresh:
            every = (*now.fp32_modules, *fresh)
            yield rungs.change(
                "fp32_modules",
                Safety.SAFE,
                now,
                {"fp32_modules": every},
                to_step=rungs.first_skipped(case),
                temporary=past == 0 and rungs.is_about_range(case),
                count=len(every),
                modules=rungs.listed(every),
            )


def _found(case: Case, now: Conditions) -> tuple[str, ...]:
    """What cured in the experiment; else the module that was localised; ahead of a failure, those near the limit."""
    if case.good("islands"):
        return rungs.names(case.number("islands", "modules", ()))
    if case.trigger is Trigger.FORECAST:
        return _near_the_limit(case)
    if not case.good("fp32") or "islands" in case.evidence:
        return ()
    named = [s.name for s in case.suspects_of("module") if s.name]
    return tuple(named[:1]) or tuple(now.fp32_modules)


def _near_the_limit(case: Case) -> tuple[str, ...]:
    limit = rungs.number(case.facts.get("half_max")) or 65504.0
    peaks = {n: rungs.number(v) for n, v in case.reading.amax.items()}
    near = [n for n, peak in peaks.items() if peak is None or peak * 2**_FEW_BITS >= limit]
    return tuple(dict.fromkeys(n.removesuffix(".input") for n in near if n))


def _same_kind(case: Case, modules: Iterable[str]) -> tuple[str, ...]:
    """Watched modules whose last name is that of one of these."""
    kinds = {m.rpartition(".")[2] for m in modules if not m.rpartition(".")[2].isdigit()}
    watched = dict.fromkeys(n.removesuffix(".input") for n in case.reading.amax)
    return tuple(n for n in watched if n.rpartition(".")[2] in kinds)
