"""The faults, one of each class of FAULTS (A to W), as functions of a Rig."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from support.incidents import Rig

NAN, INF = float("nan"), float("inf")
Fault = Callable[[Rig], Any]


def weight(rig: Rig, module: str) -> Tensor:
    """The weight of a module, to be written to."""
    return rig.model.get_submodule(module).weight.data


# -- data -----------------------------------------------------------------------------------------------------------


def no_label(step: int) -> Fault:
    """A: nothing in the step is supervised."""
    return lambda rig: rig.unlabelled.append(step)


def nan_inputs(*places: tuple[int, int]) -> Fault:
    """N: rows (step, place) whose input numbers (embeddings, as a processor hands pixels over) hold a NaN."""

    def fault(rig: Rig) -> None:
        bad = [rig.rows(step)[row] for step, row in places]

        def change(kwargs: dict[str, Any]) -> None:
            ids = kwargs.pop("input_ids")
            embedded = rig.model.get_input_embeddings()(ids)
            poison = torch.zeros_like(embedded)
            poison[rig.has(ids, *bad), 3, 0] = NAN
            kwargs["inputs_embeds"] = embedded + poison

        rig.decoder_inputs(change)

    return fault


def inf_weight(step: int, row: int) -> Fault:
    """N: one row has an infinite weight in the loss."""

    def fault(rig: Rig) -> None:
        bad = rig.rows(step)[row]

        def extra(ids: Tensor, embedded: Tensor) -> Tensor:
            weight_B = torch.where(rig.has(ids, bad), INF, 1e-3)
            return (weight_B * embedded.pow(2).mean((1, 2))).sum()

        rig.extra.append(extra)

    return fault


def pole(step: int, row: int, kind: str) -> Fault:
    """K: an operation of the loss has no finite derivative (or value) at what one row brings."""

    def fault(rig: Rig) -> None:
        bad = rig.rows(step)[row]

        def extra(ids: Tensor, embedded: Tensor) -> Tensor:
            there = rig.has(ids, bad)
            if kind == "sqrt":  # an empty span: sqrt'(0)
                span = torch.where(there[:, None, None], embedded * 0.0, embedded)
                return 1e-3 * span.pow(2).sum((1, 2)).sqrt().sum()
            level_B = embedded.pow(2).mean((1, 2))
            if kind == "log":
                return 1e-3 * torch.log(torch.where(there, level_B * 0.0, level_B + 1.0)).sum()
            # exp under a mask: 0 * inf
            kept_B = torch.where(there, 0.0, 1.0)
            return 1e-3 * (torch.exp(torch.where(there, level_B + 200.0, level_B)) * kept_B).sum()

        rig.extra.append(extra)

    return fault


# -- range ----------------------------------------------------------------------------------------------------------


def grown_mlp(layer: int, factor: float = 300.0) -> Fault:
    """B: gate, up and down of a layer are so large that the MLP leaves the range of fp16."""

    def fault(rig: Rig) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            weight(rig, f"model.layers.{layer}.mlp.{part}").mul_(factor)

    return fault


def loud_token(step: int, row: int, layer: int = 0) -> Fault:
    """B: one token drives the MLP of a layer beyond fp16; the others are as they were."""

    def fault(rig: Rig) -> None:
        token = rare_token(rig, step, row)
        table = weight(rig, "model.embed_tokens")
        table[:, 0] = 0.0
        table[token] = 0.0
        table[token, 0] = 1.0
        weight(rig, f"model.layers.{layer}.self_attn.o_proj")[0] = 0.0
        for part in ("gate_proj", "up_proj"):
            weight(rig, f"model.layers.{layer}.mlp.{part}")[:, 0] = 50.0

    return fault


def loud_row(step: int, row: int, layer: int = 1, factor: float = 2.0**20) -> Fault:
    """B: for one row, what an MLP makes between its two products is beyond fp16; what it gives out is as ever."""

    def fault(rig: Rig) -> None:
        bad, there = rig.rows(step)[row], [torch.zeros(0)]

        def look(kwargs: dict[str, Any]) -> None:
            found_B11 = rig.has(kwargs["input_ids"], bad)[:, None, None]
            there[0] = torch.where(found_B11, factor, 1.0)

        def up(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output * there[0].to(output.dtype) if bool((there[0] > 1).any()) else output

        def down(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output / there[0].to(output.dtype) if bool((there[0] > 1).any()) else output

        rig.decoder_inputs(look)
        mlp = rig.model.get_submodule(f"model.layers.{layer}.mlp")
        mlp.up_proj.register_forward_hook(up)
        mlp.down_proj.register_forward_hook(down)

    return fault


def rare_token(rig: Rig, step: int, row: int) -> int:
    """The token of a row that the first ten steps hold least often."""
    counts: dict[int, int] = {}
    for s in range(1, 11):
        for ids in rig.rows(s):
            for token in set(ids.tolist()):
                counts[token] = counts.get(token, 0) + 1
    return min(rig.rows(step)[row].tolist(), key=lambda t: counts[t])


# -- attention ------------------------------------------------------------------------------------------------------


def blind_row(step: int, row: int) -> Fault:
    """E: in a 4-D mask one row of the batch attends to nothing (needs eager attention, which adds the mask)."""

    def fault(rig: Rig) -> None:
        bad = rig.rows(step)[row]

        def change(kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"]
            width = ids.shape[1]
            real = torch.ones_like(ids) if kwargs.get("attention_mask") is None else kwargs["attention_mask"]
            seen = torch.tril(torch.ones(width, width, dtype=torch.bool))[None, None] & real[:, None, None, :].bool()
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
            mask[rig.has(ids, bad), :, width // 2] = -INF
            kwargs["attention_mask"] = mask

        rig.decoder_inputs(change)

    return fault


def nan_pad_row(rig: Rig) -> None:
    """E/H: the row of the padding token is NaN; masked positions hand it on, since 0 * NaN is NaN."""
    weight(rig, "model.embed_tokens")[rig.pad_id] = NAN
    rig.expected_bad = frozenset(n for n, p in rig.model.named_parameters() if not bool(p.isfinite().all()))


class _BadAtWidth(torch.autograd.Function):
    """The identity; its gradient is NaN where the sequence is exactly of a bad length."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, bad: bool) -> Tensor:
        ctx.bad = bad
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient * NAN if ctx.bad else gradient), None


def bad_kernel(step: int) -> Fault:
    """F: an attention kernel whose backward is NaN at lengths divisible by that of a step's batch."""

    def fault(rig: Rig) -> None:
        width = max(ids.numel() for ids in rig.rows(step))

        def attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            output, weights = sdpa_attention_forward(module, query, *args, **kwargs)
            return _BadAtWidth.apply(output, query.shape[2] % width == 0), weights

        AttentionInterface.register("bad_at_width", attention)
        AttentionMaskInterface.register("bad_at_width", sdpa_mask)
        rig.model.config._attn_implementation = "bad_at_width"

    return fault


def nan_backward(step: int, row: int, module: str) -> Fault:
    """F: the backward of one projection is NaN for one row."""

    def fault(rig: Rig) -> None:
        bad, seen = rig.rows(step)[row], {"there": False}

        def look(kwargs: dict[str, Any]) -> None:
            seen["there"] = bool(rig.has(kwargs["input_ids"], bad).any())

        rig.decoder_inputs(look)
        rig.model.get_submodule(module).register_forward_hook(
            lambda _module, _args, output: _BadAtWidth.apply(output, seen["there"])
        )

    return fault


# -- weights and state ----------------------------------------------------------------------------------------------


def nan_weight(name: str, place: int) -> Fault:
    """H: one element of a weight is NaN from the start."""

    def fault(rig: Rig) -> None:
        dict(rig.model.named_parameters())[name].data.view(-1)[place] = NAN
        rig.expected_bad = frozenset({name})

    return fault


def loud_rows(tokens: int = 40, factor: float = 1000.0) -> Fault:
    """O: new rows of the vocabulary are a thousand times too large, in embedding and head."""

    def fault(rig: Rig) -> None:
        used = sorted({int(t) for s in range(1, 9) for ids in rig.rows(s) for t in ids})
        for token in used[-max(1, len(used) // tokens) :]:
            weight(rig, "model.embed_tokens")[token] *= factor
            if rig.model.lm_head.weight is not rig.model.model.embed_tokens.weight:
                weight(rig, "lm_head")[token] *= factor

    return fault


def inf_token(step: int, row: int) -> Fault:
    """H (recipe C): the embedding of a token that first comes up in a late row is infinite."""

    def fault(rig: Rig) -> None:
        weight(rig, "model.embed_tokens")[rare_token(rig, step, row)] = INF
        rig.expected_bad = frozenset(n for n, p in rig.model.named_parameters() if not bool(p.isfinite().all()))

    return fault


def flipped_bit(after: int, name: str, place: int, bit: int = 30) -> Fault:
    """T: a bit of one fp32 weight flips between two steps."""

    def flip(rig: Rig) -> None:
        values = dict(rig.model.named_parameters())[name].data.view(-1)
        values.view(torch.int32)[place] ^= 1 << bit

    return lambda rig: rig.between(after, lambda: flip(rig))


def nan_weight_later(after: int, name: str, place: int) -> Fault:
    """T: one weight becomes NaN between two steps."""

    def spoil(rig: Rig) -> None:
        dict(rig.model.named_parameters())[name].data.view(-1)[place] = NAN

    return lambda rig: rig.between(after, lambda: spoil(rig))


def nan_moment(after: int, name: str, place: int, which: str = "exp_avg") -> Fault:
    """T: one element of a moment becomes NaN between two steps."""

    def spoil(rig: Rig) -> None:
        rig.optimizer.state[dict(rig.model.named_parameters())[name]][which].view(-1)[place] = NAN

    return lambda rig: rig.between(after, lambda: spoil(rig))


def moment(after: int, name: str, place: int, which: str, value: float) -> Fault:
    """T: one element of a moment takes another value between two steps."""

    def spoil(rig: Rig) -> None:
        rig.optimizer.state[dict(rig.model.named_parameters())[name]][which].view(-1)[place] = value

    return lambda rig: rig.between(after, lambda: spoil(rig))


class AdamWInBytes(torch.optim.AdamW):
    """R: keeps second moments in 8 bits with a map whose top half is negative, from the 5th update on."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """As AdamW, after the map."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if state and float(state["step"]) >= 5:
                    second = state["exp_avg_sq"]
                    code = (second / second.max().clamp(min=1e-30) * 255).round()
                    second.copy_(torch.where(code > 127, code - 256, code) / 255 * second.max())
        return super().step(closure)


def wrong_map(rig: Rig) -> None:
    """R: the optimizer becomes a :class:`AdamWInBytes`."""
    rig.optimizer.__class__ = AdamWInBytes
    rig.optimizer._patch_step_function()  # as its constructor would have done


class WrongAdamW(torch.optim.AdamW):
    """R: from an update on, its steps are not AdamW's: uphill, or divided by the squares instead of their root."""

    kind, after = "uphill", 4

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """As AdamW, then bent."""
        every = [(group, p, p.clone()) for group in self.param_groups for p in group["params"] if p.grad is not None]
        super().step(closure)
        for group, p, was in every:
            state = self.state[p]
            if float(state["step"]) <= self.after:
                continue
            if self.kind == "uphill":
                p.copy_(2 * was - p)
            else:
                second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
                p.copy_(was - (was - p) / (second.sqrt() + 1e-4))


def wrong_updates(kind: str, after: int) -> Fault:
    """R: the optimizer becomes a :class:`WrongAdamW`."""

    def fault(rig: Rig) -> None:
        rig.optimizer.__class__ = type("WrongAdamW", (WrongAdamW,), {"kind": kind, "after": after})
        rig.optimizer._patch_step_function()

    return fault


class _RowNorm(nn.Linear):
    """W: each row of the weight is divided by its norm, as DoRA does, without an eps."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D)."""
        norm_O1 = self.weight.pow(2).sum(1, keepdim=True).sqrt()
        return nn.functional.linear(x, self.weight / norm_O1, self.bias)


def zero_row(module: str, row: int, after: int | None = None) -> Fault:
    """W: a row without any length, from the start or between two steps."""

    def empty(rig: Rig) -> None:
        weight(rig, module)[row] = 0.0

    def fault(rig: Rig) -> None:
        rig.model.get_submodule(module).__class__ = _RowNorm
        if after is None:
            empty(rig)
        else:
            rig.between(after, lambda: empty(rig))

    return fault


# -- course ---------------------------------------------------------------------------------------------------------


def high_rate(update: int, factor: float) -> Fault:
    """I: from an update on, the learning rate is ``factor`` times too high."""

    def fault(rig: Rig) -> None:
        rig.rate = lambda updates: factor if updates >= update else 1.0

    return fault


def once(step: int) -> Fault:
    """G/T: one forward pass gives NaN, and never again."""

    def fault(rig: Rig) -> None:
        done: list[int] = []

        def extra(_ids: Tensor, embedded: Tensor) -> Tensor:
            if rig.step() == step and not done:
                done.append(step)
                return embedded.sum() * NAN
            return embedded.sum() * 0.0

        rig.extra.append(extra)

    return fault


def for_ever(step: int) -> Fault:
    """X: from a step on every computation is NaN, whatever is changed."""

    def fault(rig: Rig) -> None:
        broken: list[int] = []

        def extra(_ids: Tensor, embedded: Tensor) -> Tensor:
            if rig.step() >= step:
                broken.append(step)
            return embedded.sum() * (NAN if broken else 0.0)

        rig.extra.append(extra)

    return fault


def places(seed: int, count: int = 1) -> list[tuple[int, int]]:
    """Steps and rows from a seed: steps 5 to 7, rows 0 to 3."""
    chance = random.Random(seed)
    step = chance.randint(5, 7)
    return [(step, row) for row in chance.sample(range(4), count)]
