"""Answers of a model: sampling that reports a non-finite output instead of dying of it.

transformers' ``generate`` ends with ``probability tensor contains either inf, nan or element < 0`` when the logits
are not finite. Here each step's logits are looked at before anything is drawn from them. The loop is our own and
small, because the draw must use a generator of its own (training's random stream stays as it was), and because
autocast and function modes are per thread, which rules out transformers' threaded streaming.

Shape legend: B = 1 batch, T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finitune.core.errors import UserError, raise_all
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.models.codes import BAD_SAMPLING, NO_CHAT_TEMPLATE, NON_FINITE_LOGITS
from finitune.models.layout import bare

Messages = Sequence[Mapping[str, str]] | str
"""Chat messages (role, content), or a plain prompt."""
# What a decoder shows for the first bytes of a character that is not complete yet.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities sum to this (Holtzman et al. 2019)."""
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    """Ids that end the answer; None takes those of the tokenizer and the model."""

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, ">= 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, ">= 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "> 0, <= 1"),
        )
        raise_all(
            [UserError(BAD_SAMPLING, "sampling", field=f, value=v, rule=r) for f, v, good, r in rules if not good]
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said; ``finding`` tells why it stopped early, if it did."""

    text: str
    finding: Finding | None
    num_tokens: int
    time_s: float


@dataclass(slots=True)
class _State:
    """What a generation has reached."""

    ids: list[int] = field(default_factory=list)
    finding: Finding | None = None


def generate(
    model: nn.Module, tokenizer: Any, messages: Messages, *, device: torch.device | str | None = None, **sampling: Any
) -> Answer:
    """The model's answer. ``sampling`` are the fields of :class:`Sampling`.

    Non-finite logits end the answer with Finding MOD033, with the text up to there. Train or eval mode of every
    module and all global random states are as before; gradient checkpointing acts in train mode only, so the
    cache is used. An outer autocast or emulated-half context applies.

    Raises:
        UserError, UserErrors: a setting out of range (MOD037); messages that cannot be rendered (MOD034).
    """
    start_s = time.perf_counter()
    state = _State()
    pieces = list(_pieces(model, tokenizer, messages, Sampling(**sampling), state, device))
    return Answer("".join(pieces), state.finding, len(state.ids), time.perf_counter() - start_s)


def stream(
    model: nn.Module, tokenizer: Any, messages: Messages, *, device: torch.device | str | None = None, **sampling: Any
) -> Iterator[str | Finding]:
    """The same answer in pieces of text as they come; a Finding is the last item where it stopped early."""
    state = _State()
    yield from _pieces(model, tokenizer, messages, Sampling(**sampling), state, device)
    if state.finding is not None:
        yield state.finding


def _pieces(
    model: nn.Module,
    tokenizer: Any,
    messages: Messages,
    sampling: Sampling,
    state: _State,
    device: torch.device | str | None,
) -> Iterator[str]:
    """Text pieces; whole characters only."""
    prompt = encode_prompt(tokenizer, messages)
    stops = set(sampling.stop_ids if sampling.stop_ids is not None else default_stop_ids(model, tokenizer))
    place = torch.device(device) if device is not None else next(model.parameters()).device
    said = ""
    for token in _tokens(model, prompt, sampling, state, place):
        if token in stops:
            break
        state.ids.append(token)
        whole = tokenizer.decode(state.ids, skip_special_tokens=True)
        if not whole.endswith(_INCOMPLETE) and len(whole) > len(said):
            yield whole[len(said) :]
            said = whole
    whole = tokenizer.decode(state.ids, skip_special_tokens=True)
    if len(whole) > len(said):
        yield whole[len(said) :]


def _tokens(
    model: nn.Module, prompt: Sequence[int], sampling: Sampling, state: _State, device: torch.device
) -> Iterator[int]:
    """Draw token after token with a key/value cache; ends where the logits are not finite."""
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    ids_BT = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    cache = None
    for count in range(sampling.max_new_tokens):
        # Mode and gradient state are switched for the forward alone: a consumer of the stream may train in between.
        with torch.no_grad(), _eval_mode(model):
            output = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits_V = output.past_key_values, output.logits[0, -1].float()
        low, high = logits_V.aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            position = len(prompt) + count
            state.finding = NON_FINITE_LOGITS.find("generate", position=position, num_tokens=count)
            return
        token = draw(logits_V, sampling.temperature, sampling.top_p, generator)
        yield token
        ids_BT = torch.tensor([[token]], dtype=torch.int64, device=device)


def draw(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from finite fp32 logits (V,)."""
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest logit becomes 0 before the division: a tiny temperature gives -inf elsewhere, never NaN.
    probs_V = ((logits_V - logits_V.max()) / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_V, order_V = probs_V.sort(descending=True)
        before_V = sorted_V.cumsum(dim=-1) - sorted_V
        probs_V = torch.zeros_like(probs_V).scatter(0, order_V, torch.where(before_V < top_p, sorted_V, 0.0))
    return int(torch.multinomial(probs_V, 1, generator=generator))


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Ids of the rendered messages with the opening of the assistant's turn, or of a plain prompt.

    Raises UserError MOD034: no template, a role the template refuses, or nothing to start from.
    """
    if isinstance(messages, str):
        ids = list(tokenizer(messages).input_ids)
        reason = text("models.empty_prompt")
    else:
        ids, reason = _rendered(tokenizer, messages)
    if not ids:
        raise UserError(NO_CHAT_TEMPLATE, "messages", reason=reason)
    return ids


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], str]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return [], text("models.no_template")
    try:
        shown = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise UserError(NO_CHAT_TEMPLATE, "messages", reason=str(error)) from error
    return list(tokenizer(shown, add_special_tokens=False).input_ids), text("models.no_messages")


def default_stop_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer and the model's generation config, and ChatML's ``<|im_end|>``."""
    config = getattr(bare(model), "generation_config", None)
    named = [tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")]
    given = getattr(config, "eos_token_id", None)
    named += given if isinstance(given, list) else [given]
    return tuple(sorted({int(i) for i in named if i is not None}))


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode it had (a frozen part may differ from the whole)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
