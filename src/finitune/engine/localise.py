"""Localisation: the failing step once more, every operation looked at, to name where the failure sits.

What is named follows from the kind of failure:

- a bad loss: the first operation, and its module, that made bad values of finite ones, among those whose values
  reached the loss; or the weight, buffer or input that was bad before; with rows and tokens where they are exact
- bad gradients under a finite loss: the same for backward, and the frontier between finite and bad gradients
- a bad update: the tensors it spoilt, with weight, gradient and moments at one of the bad places
- an outlier: the parameters that make up most of the gradient's norm
- a forecast: the modules nearest to the limit of the half format, from the reading

Cost: 1.1 to 1.4 of a step. All hooks are removed whatever happens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finitune.core.incident import Suspect, Trigger
from finitune.core.types import Reading
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import Lab
from finitune.engine.localise_backward import Gradients, backward_suspects
from finitune.engine.localise_forward import forward_suspects, layouts_of
from finitune.engine.localise_modules import Modules, owner_of
from finitune.engine.monitor import read
from finitune.engine.op_numbers import is_bad, numbers_of_bad, watchable
from finitune.engine.op_trace import OpTrace, Sources
from finitune.engine.port import ReplayPort, Trace
from finitune.numerics.seeds import generators_kept

_COST = 1.3
_MAX_NAMED = 8
_MIN_SHARE = 0.05


def localise(lab: Lab, case: Case) -> tuple[Suspect, ...]:
    """Where the failure sits, the nearest to its origin first; empty where nothing can be named.

    Raises NotPossible where the port cannot compute the step again, BudgetSpent.
    """
    if case.trigger is Trigger.FORECAST:
        return _nearest_to_the_limit(case.reading)
    if case.trigger is Trigger.SILENT:
        return ()
    lab.budget.charge(_COST)
    with generators_kept():
        if case.trigger is Trigger.UPDATE:
            return tuple(_update(lab))
        if case.trigger is Trigger.RUNAWAY:
            return tuple(_of_the_last_step(lab))
        return tuple(_traced(lab.port, case.trigger))


def _of_the_last_step(lab: Lab) -> list[Suspect]:
    """The step that was committed when the failure was seen: the next batch need not be at hand."""
    before = lab.state_at(lab.before.step - 1)
    if before is None:
        return _traced(lab.port, Trigger.RUNAWAY)
    with lab.standing_at(before):
        return _traced(lab.port, Trigger.RUNAWAY)


def _traced(port: ReplayPort, trigger: Trigger) -> list[Suspect]:
    """Forward or backward origin; where loss and gradients are finite, the shares of an outlier's gradient norm."""
    modules, gradients = Modules(port.model), Gradients(port.parameters())
    trace = OpTrace(modules, Sources(port.model, _batch(port)))
    try:
        with modules.watched(), gradients.watched(trace, modules), trace:
            step = port.forward_backward()
        gradients.finish()
        layouts = layouts_of(port)
        if not math.isfinite(float(step.loss_sum)):
            return forward_suspects(trace.origins_of_loss(step.loss_sum), layouts, port.model)
        found = backward_suspects(gradients, trace, layouts, port.model)
        # Gradients may all be finite and the sum of their squares not: fp32 ends at 3.4e38.
        large = trigger in (Trigger.OUTLIER, Trigger.RUNAWAY) or not math.isfinite(read(step).grad_norm)
        return found or (shares_of(step, port.parameters()) if large else [])
    finally:
        port.abort()


def _batch(port: ReplayPort) -> Sequence[Any]:
    try:
        return port.batch()
    except NotPossible:
        return ()


# -- other failures ---------------------------------------------------------------------------------------------


def _nearest_to_the_limit(reading: Reading) -> tuple[Suspect, ...]:
    """The modules with the largest values, from what the monitor saw."""
    bits = reading.headroom_bits
    top = max(reading.amax.values(), default=0.0)
    limit = top * 2.0**bits if bits is not None and math.isfinite(bits) and top > 0 else None
    ranked = sorted(reading.amax.items(), key=lambda named: -named[1])[:3]
    found = []
    for name, amax in ranked:
        headroom = math.log2(limit / amax) if limit and amax > 0 else None
        data = {"amax": amax, "half_max": limit, "headroom_bits": headroom, "input": name.endswith(".input")}
        found.append(Suspect("module", name.removesuffix(".input"), data))
    return tuple({s.name: s for s in reversed(found)}.values())[::-1]


def shares_of(step: Trace, parameters: Sequence[tuple[str, nn.Parameter]]) -> list[Suspect]:
    """Suspects "parameter" with ``norm`` (loss scale divided out) and ``share`` of the squared norm, above 5 %."""
    gradients = {name: parameter.grad for name, parameter in parameters}
    norms = [
        (n if math.isfinite(n) else _wide_norm(gradients.get(name))) / (step.loss_scale or 1.0)
        for name, n in zip(step.parameter_names, step.norms_P.double().tolist(), strict=True)
    ]
    total = math.fsum(n * n for n in norms)
    if not 0 < total < math.inf:
        return []
    named = sorted(zip(step.parameter_names, norms, strict=True), key=lambda pair: -pair[1])[:_MAX_NAMED]
    return [
        Suspect("parameter", name, {"what": "gradient", "norm": n, "share": n * n / total, "module": owner_of(name)})
        for name, n in named
        if n * n / total >= _MIN_SHARE
    ]


def _wide_norm(gradient: torch.Tensor | None) -> float:
    """L2 norm with the squares summed in fp64."""
    return float(torch.linalg.vector_norm(gradient.detach().cpu().double())) if gradient is not None else 0.0


def _update(lab: Lab) -> list[Suspect]:
    """What the update makes bad; the update is undone."""
    port, found = lab.port, list[Suspect]()
    before = lab.before.tensors

    def look(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        found[:] = found or _spoilt(port, before)  # the gradients are still there, as the optimizer saw them

    handle = port.optimizer.register_step_post_hook(look)
    try:
        reading = read(port.forward_backward())
        if not (math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)):
            return []
        port.commit(reading)
        return found or _spoilt(port, before)
    finally:
        handle.remove()
        port.abort()
        lab.restore(lab.before)


def _spoilt(port: ReplayPort, before: Mapping[str, torch.Tensor]) -> list[Suspect]:
    """State tensors that are bad now, the first eight, each with the numbers at its first bad place."""
    bad = [(name, t) for name, t in port.state_tensors() if watchable(t) and is_bad(t)]
    return [_spoilt_one(port, name, t, before, len(bad)) for name, t in bad[:_MAX_NAMED]]


def _spoilt_one(
    port: ReplayPort, which: str, bad: torch.Tensor, before: Mapping[str, torch.Tensor], num_bad: int
) -> Suspect:
    name, parameter = parameter_of(port, which, bad)
    data = {**numbers_of_bad(bad), "what": "update", "num_bad_tensors": num_bad}
    kind = "parameter" if which == name else "moment"
    if parameter is None:
        return Suspect(kind, which, data)
    place = tuple(data["index"])
    state = port.optimizer.state.get(parameter, {})
    moments = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
    data |= {"parameter": name, "module": owner_of(name), "weight_before": _at(before.get(name), parameter, place)}
    data |= {"gradient": _at(parameter.grad, parameter, place)}
    data |= {"moments": {k: _at(v, parameter, place) for k, v in moments.items()}}
    return Suspect(kind, which, data)


def parameter_of(port: ReplayPort, which: str, tensor: torch.Tensor) -> tuple[str, nn.Parameter | None]:
    """The parameter that a state tensor is, or is a moment of; its own name and None where it is of none."""
    for name, parameter in port.parameters():
        if name == which:
            return name, parameter
        if any(v is tensor for v in port.optimizer.state.get(parameter, {}).values()):
            return name, parameter
    return which, None


def _at(tensor: torch.Tensor | None, like: torch.Tensor, place: tuple[int, ...]) -> float | None:
    return float(tensor[place]) if tensor is not None and tensor.shape == like.shape else None
