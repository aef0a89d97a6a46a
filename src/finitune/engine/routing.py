"""Routing: how a mixture of experts shares its tokens out, and whether one expert has taken nearly all of them.

A router that sends everything to one expert makes no bad number: the others learn nothing, and the loss hides it. So
the routers' probabilities are averaged over the tokens of a step now and then, on the tokens that are no padding.

The chosen experts alone would not tell: the top-k of a fresh router often holds the same expert for every token, by
differences that mean nothing. Its probabilities are then near 1 / experts; those of a router that has collapsed are
not (Fedus et al. 2021, "Switch Transformers", section 2.2: the balance loss rests on the same mean, P_i).

Hooks stand on the routers only during the steps that are looked at: every other step pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.causes._signs import is_router
from finitune.engine.conditions import NotPossible
from finitune.engine.look.codes import ONE_EXPERT
from finitune.engine.port import ReplayPort

LOOK_EVERY_STEPS = 8
"""As often as the monitor looks outside of fp16."""
LOOKS = 4
"""Batches in a row that have to show it: those after the first are looked at one after the other."""
MIN_TOKENS = 64
"""In all of these batches together: a few tokens may well be all alike."""
LEFT_OVER = 0.1
"""Of its fair share, (1 - share) / (experts - 1) against 1 / experts: less than a tenth is left to each of the others.
Trained mixtures are far from it: no expert takes most of the tokens of any domain (Jiang et al. 2024, "Mixtral of
Experts", section 5)."""
_PARTS = 1e-3
_DEEP = 2


@dataclass(slots=True)
class Gate:
    """One router and what was seen of it."""

    name: str
    module: nn.Module
    num_experts: int
    looks: int = 0
    """Batches in a row that went to one expert."""
    tokens: float = 0.0
    """In these batches."""
    usual: float = 0.0
    """The largest share at the newest look at which nothing was wrong; 0: there was none."""
    since: int = 0
    told: bool = False


class Routing:
    """Watches the routers of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.gates = [] if _is_compiled(model) else list(gates_of(model))
        self._handles: list[Any] = []
        self._seen: list[tuple[Gate, Tensor]] = []
        """What each call of a router put out, in order."""
        self._masks: list[Tensor] = []

    def begin(self, port: ReplayPort) -> None:
        """A step is about to be computed: hooks are put in place where it is to be looked at."""
        self._stop()
        open_gates = [g for g in self.gates if not g.told]
        step = port.state.step
        if not open_gates or (step % LOOK_EVERY_STEPS and not any(g.looks for g in open_gates)):
            return
        self._masks = list(_masks_of(port))
        for gate in open_gates:
            self._handles.append(gate.module.register_forward_hook(self._hook(gate)))

    @torch.no_grad()
    def end(self, step: int) -> list[Finding]:
        """The step was computed; what is to be said. One host read where it was looked at, nothing otherwise."""
        seen, masks = self._seen, self._masks
        self._stop()
        found = [_judged(gate, shares, tokens, step) for gate, shares, tokens in _shares(seen, masks)]
        return [f for f in found if f is not None]

    def close(self) -> None:
        """Watch nothing any more."""
        self._stop()
        self.gates = []

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._masks = [], [], []

    def _hook(self, gate: Gate) -> Any:
        seen = self._seen

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            logits_NE = _logits(output, gate.num_experts)
            if logits_NE is not None:
                seen.append((gate, logits_NE))

        return hook


def _shares(seen: Sequence[tuple[Gate, Tensor]], masks: Sequence[Tensor]) -> Iterator[tuple[Gate, list[float], float]]:
    """Of each router the sums of its experts' probabilities over the tokens, and how many tokens that were.

    Routers of one shape are taken together: dozens of small operations would cost more than the looking.
    """
    calls: dict[int, int] = {}
    groups: dict[Any, list[tuple[Gate, Tensor, Tensor | None]]] = {}
    for gate, logits_NE in seen:
        call = calls[id(gate)] = calls.get(id(gate), -1) + 1
        mask = masks[call % len(masks)] if masks else None
        fits = mask is not None and mask.numel() == len(logits_NE)
        key = (logits_NE.shape, logits_NE.device, fits)
        groups.setdefault(key, []).append((gate, logits_NE, mask if fits else None))
    sums: dict[int, tuple[Gate, list[float]]] = {}
    for group in groups.values():
        for (gate, _, _), values in zip(group, _sums(group).tolist(), strict=True):
            known = sums.get(id(gate))
            total = values if known is None else [a + b for a, b in zip(known[1], values, strict=True)]
            sums[id(gate)] = (gate, total)
    for gate, (*shares, tokens) in sums.values():
        yield gate, shares, tokens


def _sums(group: Sequence[tuple[Gate, Tensor, Tensor | None]]) -> Tensor:
    """Of each call: summed probabilities of the experts, and the number of tokens, (G, E + 1) fp32."""
    values_GNE = torch.stack([logits_NE for _, logits_NE, _ in group]).float()
    are_shares_G = (values_GNE > 0).flatten(1).all(1) & ((values_GNE.sum(-1) - 1).abs() < _PARTS).all(1)
    probabilities_GNE = torch.where(are_shares_G[:, None, None], values_GNE, torch.softmax(values_GNE, -1))
    masks = [mask.reshape(-1).to(values_GNE.device, torch.float32) for _, _, mask in group if mask is not None]
    if not masks:
        tokens_G1 = values_GNE.new_full((len(group), 1), values_GNE.shape[1])
        return torch.cat([probabilities_GNE.sum(1), tokens_G1], 1)
    mask_GN = torch.stack(masks)
    # A selection: what a router makes of padding may be anything, and 0 times NaN is NaN.
    kept_GNE = torch.where(mask_GN[..., None] > 0, probabilities_GNE, 0.0)
    return torch.cat([kept_GNE.sum(1), (mask_GN > 0).sum(1, keepdim=True).float()], 1)


def _judged(gate: Gate, shares: Sequence[float], tokens: float, step: int) -> Finding | None:
    """What a look comes to. ``shares``: sums of the probabilities of each expert over ``tokens``."""
    if not tokens > 0:
        return None
    expert = max(range(len(shares)), key=lambda e: shares[e])
    share = shares[expert] / tokens
    others = gate.num_experts * (1.0 - share) / (gate.num_experts - 1)
    if not others < LEFT_OVER:
        gate.looks, gate.tokens, gate.usual = 0, 0.0, share
        return None
    gate.since = gate.since if gate.looks else step
    gate.looks, gate.tokens = gate.looks + 1, gate.tokens + tokens
    if gate.looks < LOOKS or gate.tokens < MIN_TOKENS:
        return None
    gate.told = True
    before = f"{100 * gate.usual:.3g}" if gate.usual else "-"
    numbers: dict[str, Any] = {"expert": expert, "experts": gate.num_experts, "since": gate.since, "looks": gate.looks}
    numbers |= {"percent": 100 * share, "fair": 100 / gate.num_experts, "before": before, "tokens": int(gate.tokens)}
    return ONE_EXPERT.find(gate.name, name=gate.name, fault_class="Q", **numbers)


# -- what routers put out -------------------------------------------------------------------------------------------


def _logits(output: Any, num_experts: int) -> Tensor | None:
    """What a router puts out for each token and expert, (N, E): logits, or a softmax of them.

    Of several tensors of that width the logits are meant, the only one with numbers below 0. Nothing waits for the
    device here.
    """
    given = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple | list) else []
    chosen_NE: Tensor | None = None
    for tensor in given:
        fits = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel()
        if fits and tensor.shape[-1] == num_experts:
            values_NE = tensor.detach().reshape(-1, num_experts)
            if chosen_NE is None:
                chosen_NE = values_NE
            elif chosen_NE.shape == values_NE.shape:
                chosen_NE = torch.where((chosen_NE >= 0).all(), values_NE, chosen_NE)
    return chosen_NE


def _masks_of(port: ReplayPort) -> Iterator[Tensor]:
    """The padding masks of the micro-batches; none where one of them has no such mask."""
    try:
        micros = port.batch()
    except NotPossible:
        return
    masks = [m.get("attention_mask") if isinstance(m, Mapping) else None for m in micros]
    if all(isinstance(m, Tensor) and m.dim() == _DEEP for m in masks):
        yield from (m for m in masks if m is not None)


# -- which modules are routers ---------------------------------------------------------------------------------------


def gates_of(model: nn.Module) -> Iterator[Gate]:
    """Routers: modules with a matrix of as many rows as there are experts beside them.

    Names alone would not do: many a plain MLP has a ``gate``. Where the experts are called so, the router may have any
    name; elsewhere it has to be named like one.
    """
    seen: set[int] = set()
    for prefix, block in model.named_modules():
        counts = dict(_experts(block))
        if not counts:
            continue
        for name, part in block.named_modules():
            inside = name.partition(".")[0] in counts or not name or name.count(".") >= _DEEP
            weight = getattr(part, "weight", None)
            if inside or not isinstance(weight, Tensor) or weight.dim() != _DEEP or id(part) in seen:
                continue
            if weight.shape[0] in counts.values() and (is_router(name) or any("expert" in c for c in counts)):
                seen.add(id(part))
                yield Gate(f"{prefix}.{name}" if prefix else name, part, int(weight.shape[0]))


def _experts(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Children that are a collection of experts, and how many each holds (two at least)."""
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            count = len(child) if len({type(m) for m in child.children()}) == 1 else 0
        else:
            whole = [p.shape[0] for p in child.parameters(recurse=False) if p.dim() > _DEEP]
            told = getattr(child, "num_experts", None) or getattr(child, "moe_num_experts", None)
            count = int(whole[0]) if whole else told if isinstance(told, int) and "expert" in name else 0
        if count > 1:
            yield name, count


def _is_compiled(model: nn.Module) -> bool:
    """Hooks would break compiled code apart."""
    return any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules())
