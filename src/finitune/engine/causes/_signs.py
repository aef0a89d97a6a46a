"""Signs that several causes read from a case. Total: whatever a suspect or a number holds, nothing raises."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from finitune.core.incident import Result, Suspect, Trigger
from finitune.engine.case import Case

FP16_MAX = 65504.0
"""Largest finite number of fp16 (IEEE 754 binary16)."""
FAILED = (Trigger.LOSS, Trigger.GRADIENT, Trigger.SCALE, Trigger.OUTLIER)
"""Kinds of failure that the step itself shows, before any update."""
SPOILT = (Trigger.LOSS, Trigger.GRADIENT, Trigger.SCALE, Trigger.UPDATE)
"""Kinds of failure with a NaN or inf in them."""

# Products of two such numbers, summed over any width, stay far inside of the format.
_SOUND, _SOUND_IN_FP16 = 2.0**40, 2.0**4
# A gradient or an update that this step makes is no part of the state before it.
_MADE_NOW = ("gradient", "update")
_PREFIX = re.compile(r"^(aten|torch|prims|prim)[.:]+_*|^_+")
_SUFFIX = re.compile(r"(backward\d*|\.(default|tensor|scalar|out|self|int|dim\w*|scalar_\w+|tensor_\w+|\w*overload))+$")
_SOFTMAX = re.compile(r"(?<!log_)softmax|scaled_dot_product|sdpa")
_ATTENTION = re.compile(r"attn|attention|sdpa|scaled_dot_product|flash|(?<!log_)softmax")
_ROUTER = re.compile(r"^(gate|gating|wg|\w*router\w*)$")
_VOCABULARY = re.compile(r"embed|wte|lm_head|output_layer|word_emb|tok_")
_CROSS_ENTROPIES = ("nll_loss_forward", "nll_loss2d_forward", "nll_loss")
_SINGULAR = frozenset(
    (
        *("sqrt", "rsqrt", "log", "log2", "log10", "log1p", "expm1", "exp", "exp2", "div", "true_divide", "reciprocal"),
        *("pow", "std", "var", "acos", "asin", "acosh", "atanh", "norm", "linalg_vector_norm", "linalg_norm", "cdist"),
        *("logsumexp", "xlogy", "lgamma"),
    )
)
"""Operations with a pole, or with an infinite derivative, at ordinary-looking inputs."""


def number(value: Any) -> float | None:
    """``value`` as a finite float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def strings(value: Any) -> tuple[str, ...]:
    """The texts in a list; empty for anything else."""
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list | tuple) else ()


def shown(value: Any) -> Any:
    """A number or text for a page; "-" where there is none."""
    return "-" if value is None or value == "" else value


def listed(names: Iterable[str], most: int = 4) -> str:
    """Names for a page, at most so many of them."""
    every = list(dict.fromkeys(names))
    tail = f", ... ({len(every)})" if len(every) > most else ""
    return (", ".join(every[:most]) + tail) or "-"


def of(suspect: Suspect | None, name: str) -> Any:
    """A number of a suspect; None without one."""
    return suspect.data.get(name) if suspect is not None else None


def first(case: Case, *kinds: str) -> Suspect | None:
    """The first suspect of these kinds."""
    return next(iter(case.suspects_of(*kinds)), None)


# -- what was localised ---------------------------------------------------------------------------------------------


def plain_op(name: str) -> str:
    """``aten._softmax.default``, ``SoftmaxBackward0`` and ``softmax`` are one operation: softmax."""
    return _SUFFIX.sub("", _PREFIX.sub("", name.strip().lower())).strip("_")


def ops(case: Case) -> tuple[str, ...]:
    """Plain names of the first bad operation: of the node of backward, and of what it was computing."""
    found = first(case, "op")
    if found is None:
        return ()
    told = [found.data.get("node"), found.data.get("op")]
    names = [t for t in told if isinstance(t, str) and t] or [found.name.split(" in ")[0].split(" (")[0]]
    return tuple(dict.fromkeys(plain_op(n) for n in names))


def op(case: Case) -> str:
    """The first bad operation by its plain name; "" where none was found."""
    return next(iter(ops(case)), "")


def place(case: Case) -> str:
    """The place of the first bad operation: a module, or "(loss)", "(model)" outside of all; "" where not known."""
    inside = of(first(case, "op"), "module")
    if isinstance(inside, str):
        return inside
    holder = first(case, "module")
    return holder.name if holder is not None else ""


def module(case: Case) -> str:
    """The module in which the first bad operation sits; "" where it sits outside of all parts, or is not known."""
    return "" if place(case).startswith("(") else place(case)


def spot(case: Case) -> str:
    """Where the failure was localised, for the reader: a module, or else an operation."""
    found = first(case, "op")
    return module(case) or (found.name if found is not None else "")


def phase(case: Case) -> str:
    """The pass, "forward" or "backward", in which the first bad number was made."""
    for suspect in case.suspects_of("op", "module"):
        if suspect.data.get("phase") in ("forward", "backward"):
            return str(suspect.data["phase"])
    return "backward" if case.trigger in (Trigger.GRADIENT, Trigger.SCALE) else "forward"


def from_clean_input(case: Case) -> bool:
    """The operation made its bad output from finite input, as far as was seen."""
    return all(s.data.get("input_finite") is not False for s in case.suspects_of("op", "module")[:2])


def in_attention(case: Case) -> bool:
    """The first bad operation belongs to attention itself; a projection inside of it is a plain product."""
    innermost = module(case).lower().rpartition(".")[2]
    return any(_ATTENTION.search(o) for o in ops(case)) or bool(_ATTENTION.search(innermost))


def is_softmax(case: Case) -> bool:
    """The first bad operation is a softmax, or an attention kernel that holds one."""
    return any(_SOFTMAX.search(o) for o in ops(case))


def from_sound_numbers(case: Case) -> bool:
    """The first bad number was made of finite numbers of ordinary size: the code made it, not the range of a format.

    Where the operation was computed again in fp32 and is finite there, it is the range.
    """
    found = first(case, "op") or first(case, "module")
    largest = number(of(found, "input_amax"))
    if of(found, "input_finite") is not True or largest is None or number(of(found, "value")) is not None:
        return False
    untried = of(found, "value") is None and of(found, "dtype") == "float16"
    return largest <= (_SOUND_IN_FP16 if untried else _SOUND)


def breaks_backward(case: Case) -> bool:
    """An operation of the backward pass makes a bad gradient of clean input and a clean incoming gradient."""
    return phase(case) == "backward" and from_sound_numbers(case)


def is_router(name: str) -> bool:
    """A module or parameter name has a router in it (``gate_proj`` of a plain MLP is none)."""
    return any(_ROUTER.match(part) for part in name.lower().split("."))


def of_vocabulary(suspect: Suspect) -> bool:
    """A table with a row for each token id, as far as the localisation saw it; else by its name."""
    return suspect.data.get("table") is not False and bool(_VOCABULARY.search(suspect.name.lower()))


def is_singular(case: Case) -> bool:
    """The first bad operation has a pole or an infinite derivative."""
    return any(o in _SINGULAR for o in ops(case))


def in_loss(case: Case) -> bool:
    """The first bad operation sits behind the model, or where the model computes its own loss: in no part of it."""
    return first(case, "op") is not None and module(case) == ""


def empty_micro(case: Case) -> int | None:
    """The micro-batch (from 0) whose mean over no targets is NaN, although its logits are finite; None where none is.

    The mean of torch's cross entropy divides by the number of targets: from finite numbers only 0 / 0 gives NaN. A
    script's own division counts where no label of that micro-batch does.
    """
    found = first(case, "op")
    micro = of(found, "micro")
    if of(found, "nan") is not True or of(found, "input_finite") is not True or not isinstance(micro, int):
        return None
    own = in_loss(case) and is_singular(case) and micro in empty_micros(case)
    return micro if own or op(case) in _CROSS_ENTROPIES else None


def empty_micros(case: Case) -> tuple[int, ...]:
    """Micro-batches (from 0) in which no label counts."""
    return steps(case.number("supervised_tokens", "empty_micros", ()))


# -- what experiments showed ----------------------------------------------------------------------------------------


def is_half(case: Case) -> bool:
    """Products or trainable weights are in fp16."""
    return case.is_half or case.has_half_weights


def precision_cures(case: Case) -> bool:
    """The failure goes away in fp32 or bf16."""
    return case.good("fp32") or (case.good("bf16") and not case.bad("fp32"))


def cured_by(case: Case, *experiments: str) -> str:
    """The first of these that made the failure go away; "-" for none."""
    return next((e for e in experiments if case.result(e) is Result.GOOD), "-")


def rows(case: Case) -> tuple[str, ...]:
    """RowId texts of the rows that fail alone."""
    if not case.good("rows"):
        return ()
    found = strings(case.number("rows", "rows", ())) or tuple(s.name for s in case.suspects_of("row"))
    return tuple(dict.fromkeys(found))


def bad_state(case: Case) -> tuple[Suspect, ...]:
    """Tensors of weights, moments and buffers that were bad before the step."""
    if not case.bad("scan_state"):
        return ()
    return tuple(s for s in case.suspects_of("parameter", "buffer", "moment") if s.data.get("what") not in _MADE_NOW)


def since(suspect: Suspect) -> int | None:
    """The first step whose state has it bad, where the state before has it good; None: from the start, or not known."""
    step = suspect.data.get("since_step")
    known = isinstance(step, int) and not isinstance(step, bool) and step > 0
    return step if known and suspect.data.get("since_exact") is not False else None


def went_bad(case: Case) -> tuple[Suspect, ...]:
    """Those of :func:`bad_state` that were good before.

    A tensor of which no earlier state is kept (a frozen weight) counts where another one is known to have gone bad, or
    where batches that went well in this very run fail on it now.
    """
    bad = bad_state(case)
    others = any(since(s) is not None or was_sound(s) for s in bad)
    failed_since = (
        case.reading.step > 1 and case.bad("known_good_batch") and not case.number("known_good_batch", "num_good")
    )
    known = (s for s in bad if since(s) is not None or was_sound(s) or (_is_undated(s) and (others or failed_since)))
    return tuple(known)


def was_sound(suspect: Suspect) -> bool:
    """An earlier state, or the model that training began from, has the tensor sound."""
    return number(suspect.data.get("sound_at")) is not None


def _is_undated(suspect: Suspect) -> bool:
    return since(suspect) is None and suspect.data.get("since_exact") is not True


def steps(values: Any) -> tuple[int, ...]:
    """The step numbers in a list."""
    return tuple(int(v) for v in values if number(v) is not None) if isinstance(values, list | tuple) else ()


def is_told(case: Case, code: str) -> bool:
    """A check filed what it found under the code of the cause: the finding is the thing itself."""
    return case.finding.code == code


def tokens(case: Case) -> str:
    """The token spans that trigger the failure, for the reader."""
    return listed(f"{s.name} {s.data.get('span', '')}".strip() for s in case.suspects_of("tokens"))
