"""The operation trace: every operation of a replayed step is looked at, and bad values are followed to their origin.

An operation that makes NaN or inf from finite inputs is an *origin*; so is a tensor that was bad before anybody
touched it (a weight, a buffer, the batch). Bad values carry the numbers of their origins from tensor to tensor, by
storage, so that the loss, or a gradient, tells which origins it has. An inf that is masked away later leaves no trace
in the loss and is never blamed. Constants of -inf (attention masks, vocabulary masks) are lawful as long as they stay
-inf, and so is what becomes -inf of a mask that holds the lowest number of its format: the operation that makes a NaN
or +inf of them is the origin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finitune.engine.localise_modules import OUTSIDE, Modules, is_part, owner_of
from finitune.engine.op_numbers import constant_of, extremes, measured, numbers_of_bad, watchable

CONSTANT = -1
"""The origin of constants written as such."""
UNSEEN = -2
"""The origin of what a backward made that was not looked at, because the loss was bad already."""
_MAX_MEASURED = 64
_MAX_SPREAD = 4
_UNSET_SEQUENCE_NR = 2**63

# They give memory whose content means nothing yet.
_UNFILLED = frozenset(
    f"aten::{n}"
    for n in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted", "resize_")
)
# They make tensors of a number.
_CONSTANTS = frozenset(
    f"aten::{n}" for n in ("full", "full_like", "new_full", "scalar_tensor", "lift_fresh", "lift_fresh_copy", "lift")
)
# In place, but what was there before does not count.
_OVERWRITING = frozenset(
    f"aten::{n}"
    for n in ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "set_")
)
# Outside of modules (a head that the loss applies itself), what they make still belongs to the weight they read.
_CARRYING = frozenset(f"aten::{n}" for n in ("_to_copy", "clone", "mm", "addmm", "bmm", "baddbmm", "linear"))


@dataclass(slots=True)
class Origin:
    """Where bad values began."""

    kind: str
    """"op", or what was bad before: "parameter", "buffer", "input"."""
    name: str
    """``aten.mm``, or the name of the tensor."""
    module: str
    micro: int
    backward: bool
    node: str = ""
    """Autograd node at work, in backward."""
    data: dict[str, Any] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    """Which places of the output are bad, the last dimension reduced; on the host."""
    spread: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    """Of a single number: by shape, the same of tensors that it made bad in part, as they were last."""


class _Input(NamedTuple):
    tensor: torch.Tensor
    low: float
    high: float

    @property
    def bad(self) -> bool:
        return not (math.isfinite(self.low) and math.isfinite(self.high))

    @property
    def only_minus_inf(self) -> bool:
        return not math.isnan(self.low) and self.high < math.inf

    @property
    def peak(self) -> float:
        return 0.0 if self.bad else max(abs(self.low), abs(self.high))


class _Sort(NamedTuple):
    """What kind of operation it is."""

    name: str
    mutable: bool
    dumb: bool
    """Its output says nothing new: a view, or memory that is not filled yet."""


@cache
def _sort(func: Any) -> _Sort:
    name = func._schema.name
    dumb = name not in _CONSTANTS and (func.is_view or name in _UNFILLED)
    return _Sort(name, func._schema.is_mutable, dumb)


def _seen(values: Any) -> list[_Input]:
    return [_Input(t, *extremes(t)) for t in values if watchable(t)]


class Sources:
    """The tensors that exist before the step: weights, buffers, the batch."""

    def __init__(self, model: torch.nn.Module, batch: Sequence[Any]) -> None:
        self._known: dict[int, tuple[str, str, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            self._add("parameter", name, parameter)
        for name, buffer in model.named_buffers():
            self._add("buffer", name, buffer)
        self._batch: list[tuple[str, torch.Tensor]] = []
        for micro, nest in enumerate(batch):
            for path, leaf in torch.utils._pytree.tree_flatten_with_path(nest)[0]:
                if isinstance(leaf, torch.Tensor):
                    name = path_text(path) or f"micro-batch {micro}"
                    self._add("input", name, leaf)
                    self._batch.append((name, leaf))

    def _add(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        if watchable(tensor):
            self._known.setdefault(tensor.untyped_storage()._cdata, (kind, name, tensor.detach()))

    def find(self, tensor: torch.Tensor) -> tuple[str, str, torch.Tensor] | None:
        """Kind, name and whole of the known tensor that this one is a view of, or (batch) a copy of."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is not None:
            return known
        for name, leaf in self._batch:
            if leaf.shape == tensor.shape and torch.allclose(leaf.to(tensor), tensor, equal_nan=True):
                return "input", name, leaf
        return None

    def owner(self, tensor: torch.Tensor) -> str | None:
        """The module that owns the parameter that this tensor is, or is a view of."""
        kind, name, _ = self._known.get(tensor.untyped_storage()._cdata, ("", "", None))
        return owner_of(name) if kind == "parameter" else None


def path_text(path: Sequence[Any]) -> str:
    """``labels``, ``0.weights``: a place in a nest."""
    return ".".join(str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path)


class OpTrace(TorchDispatchMode):
    """Looks at every operation inside; see the module's page. Reads values on the host: for replays only."""

    def __init__(self, modules: Modules, sources: Sources) -> None:
        super().__init__()
        self.origins: list[Origin] = []
        """In the order in which they came about."""
        self.paused = False
        self._modules, self._sources = modules, sources
        # The weak reference keeps a storage's address from being given away again.
        self._taint: dict[int, tuple[StorageWeakRef, frozenset[int]]] = {}
        self._fresh: list[Origin] = []
        self._carried: dict[int, tuple[StorageWeakRef, str]] = {}
        # The last number that forward gave is bad: that is the loss, and backward then has nothing to tell.
        self._lost = self._skipped = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, then look at what it put out."""
        kwargs = kwargs or {}
        if self.paused or not isinstance(func, torch._ops.OpOverload) or _sort(func).dumb:
            return func(*args, **kwargs)
        backward = _in_backward()
        if backward and not self._modules.inside:
            self._modules.backward_seen = True
        if backward and self._lost:
            self._skipped = True
            return func(*args, **kwargs)
        before = None
        if _sort(func).mutable:
            with _Aside():
                before = self._inputs(func, args, kwargs)
        out = func(*args, **kwargs)
        with _Aside():
            self._look(func, args, kwargs, out, before)
        return out

    # -- what is asked afterwards -----------------------------------------------------------------------------

    def origins_of(self, tensor: torch.Tensor) -> list[Origin]:
        """The origins of a tensor's bad values, in order of time; constants only where there is nothing else."""
        _, numbers = self._taint.get(tensor.untyped_storage()._cdata, (None, frozenset[int]()))
        return [self.origins[n] for n in sorted(numbers) if n >= 0]

    def origins_of_loss(self, loss: torch.Tensor) -> list[Origin]:
        """The origins of a bad loss; where the port computed it aside, those of forward in general."""
        known = self.origins_of(loss)
        return known or [o for o in self.origins if not o.backward]

    # -- looking ----------------------------------------------------------------------------------------------

    def _inputs(self, func: Any, args: Any, kwargs: Any) -> list[_Input]:
        """The floating inputs; of an operation that overwrites its target, without the target."""
        leaves = tree_leaves((args, kwargs))
        overwritten = _overwritten(func, args, kwargs)
        return _seen(t for t in leaves if not any(t is o for o in overwritten))

    def _look(self, func: Any, args: Any, kwargs: Any, out: Any, before: list[_Input] | None) -> None:
        outputs = (out,) if isinstance(out, torch.Tensor) else tree_leaves(out)
        if _sort(func).name in _CARRYING and not is_part(self._modules.here()):
            self._carry(args, outputs)
        seen = _seen(outputs)
        bad = [o for o in seen if o.bad]
        # Backward begins with a gradient of ones, made before it has begun.
        scalar = bool(seen) and seen[0].tensor.numel() == 1 and _sort(func).name != "aten::ones_like"
        if scalar and not _in_backward():
            self._lost = bool(bad)
        if not bad:
            return
        name = _sort(func).name
        inputs = self._inputs(func, args, kwargs) if before is None else before
        numbers = self._numbers(name, inputs, bad, args, kwargs)
        if not numbers:
            # Whatever is bad among the inputs is a constant here.
            numbers = self._new_op(func, args, kwargs, bad[0].tensor, inputs)
        for one in bad:
            self._mark(one.tensor, numbers)
        self._spread(bad[0].tensor, numbers)
        self._first_readers(name, bad[0].tensor)

    def _spread(self, out: torch.Tensor, numbers: frozenset[int]) -> None:
        """A single number (of a group, of a row) has no place in the batch; what it went into may have one."""
        lone = [o for n in numbers if n >= 0 and (o := self.origins[n]).kind == "op" and _is_lone(o)]
        if not lone or out.dim() == 0 or _in_backward():
            return
        shape, mask = tuple(out.shape), _mask(out)
        for origin in lone:
            if not mask.all() and (shape in origin.spread or len(origin.spread) < _MAX_SPREAD):
                origin.spread[shape] = mask

    def _carry(self, args: Any, outputs: Any) -> None:
        owner = self._owner(t for t in args if isinstance(t, torch.Tensor))
        if owner is None:
            return
        for out in outputs:
            storage = out.untyped_storage()
            self._carried[storage._cdata] = (StorageWeakRef(storage), owner)

    def _owner(self, tensors: Iterable[torch.Tensor]) -> str | None:
        """The module whose parameter one of these is, or was made of."""
        for tensor in tensors:
            carried = self._carried.get(tensor.untyped_storage()._cdata)
            owner = carried[1] if carried is not None else self._sources.owner(tensor)
            if owner is not None:
                return owner
        return None

    def _first_readers(self, name: str, out: torch.Tensor) -> None:
        """What the first operation made of tensors that were bad before."""
        for origin in self._fresh:
            origin.data |= {"op": name.replace("::", ".")}
            if origin.kind != "input":
                origin.data["out_shape"], origin.mask = list(out.shape), _mask(out)
        self._fresh.clear()

    def _numbers(
        self, name: str, inputs: Sequence[_Input], bad: Sequence[_Input], args: Any, kwargs: Any
    ) -> frozenset[int]:
        """The origins that the outputs inherit; empty where the operation is an origin itself."""
        if name in _CONSTANTS:
            return frozenset({CONSTANT})
        held: frozenset[int] = frozenset()
        for one in inputs:
            if one.bad:
                held |= self._held(one.tensor)
        if held - {CONSTANT}:
            return held
        lawful = bool(held) or _writes_minus_inf(args, kwargs) or any(_is_lowest(i) for i in inputs)
        return frozenset({CONSTANT}) if lawful and all(o.only_minus_inf for o in bad) else frozenset()

    def _held(self, tensor: torch.Tensor) -> frozenset[int]:
        known = self._taint.get(tensor.untyped_storage()._cdata)
        return known[1] if known is not None else self._new_source(tensor)

    def _mark(self, tensor: torch.Tensor, numbers: frozenset[int]) -> None:
        storage = tensor.untyped_storage()
        known = self._taint.get(storage._cdata)
        reference = known[0] if known else StorageWeakRef(storage)
        self._taint[storage._cdata] = (reference, numbers | (known[1] if known else frozenset()))

    # -- origins ----------------------------------------------------------------------------------------------

    def _new_source(self, tensor: torch.Tensor) -> frozenset[int]:
        """A tensor that is bad although no operation made it so."""
        known = self._sources.find(tensor)
        if known is None and self._skipped:
            return frozenset({UNSEEN})
        kind, name, whole = known or ("input", f"{str(tensor.dtype)[6:]} {list(tensor.shape)}", tensor)
        origin = Origin(kind, name, self._modules.here(), self._modules.micro, _in_backward())
        origin.data = {**numbers_of_bad(whole), "matched": known is not None}
        if kind == "input":
            origin.data["out_shape"], origin.mask = list(whole.shape), _mask(whole)
        self._fresh.append(origin)
        numbers = self._added(origin)
        self._mark(tensor, numbers)
        return numbers

    def _new_op(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: Sequence[_Input]) -> frozenset[int]:
        module, node, backward = self._where([i.tensor for i in inputs])
        name = func._schema.name.replace("::", ".")
        origin = Origin("op", name, module, self._modules.micro, backward, node)
        if len(self.origins) < _MAX_MEASURED:
            origin.data = measured(func, args, kwargs, out, [i.peak for i in inputs])
            origin.data["constant"] = next((constant_of(i.tensor) for i in inputs if i.bad), None)
            origin.data["out_shape"], origin.mask = list(out.shape), _mask(out)
        return self._added(origin)

    def _where(self, tensors: Sequence[torch.Tensor]) -> tuple[str, str, bool]:
        """Module, autograd node, and whether it is a backward operation."""
        if self._modules.inside or not _in_backward():
            here = self._modules.here()
            return here if is_part(here) else self._owner(tensors) or here, "", False
        node = torch._C._current_autograd_node()
        if node is None:
            return OUTSIDE, "", True
        number = node._sequence_nr()
        hook = number >= _UNSET_SEQUENCE_NR  # the accumulation of a parameter's gradient, and hooks on it
        return OUTSIDE if hook else self._modules.of_node(number), node.name(), True

    def _added(self, origin: Origin) -> frozenset[int]:
        self.origins.append(origin)
        return frozenset({len(self.origins) - 1})


class _Aside:
    """The body computes beside the step: no autograd, no function modes, no autocast."""

    __slots__ = ("_function", "_grad")

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._function = torch._C.DisableTorchFunction()
        self._function.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._function.__exit__(*error)
        torch._C._set_grad_enabled(self._grad)


def _is_lone(origin: Origin) -> bool:
    """A forward operation that gave one number."""
    return not origin.backward and origin.mask is not None and origin.mask.numel() == 1


def _is_lowest(one: _Input) -> bool:
    """It holds the lowest number of its format: a mask. Added twice or cast to a smaller format, that is -inf."""
    real = one.tensor.is_floating_point() and one.tensor.element_size() > 1
    return real and not one.bad and one.low == torch.finfo(one.tensor.dtype).min


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _mask(tensor: torch.Tensor) -> torch.Tensor:
    bad = torch.isfinite(tensor.detach()).logical_not_()
    return (bad.any(dim=-1) if bad.dim() > 1 else bad).cpu()


def _overwritten(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The tensors that the operation writes without reading them."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    named = {**{a.name: v for a, v in zip(schema.arguments, args, strict=False)}, **kwargs}
    whole = schema.name in _OVERWRITING
    return [
        value
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and (whole or a.is_out)
        for value in tree_leaves(named.get(a.name))
    ]


def _writes_minus_inf(args: Any, kwargs: Any) -> bool:
    numbers = (v for v in tree_leaves((args, kwargs)) if isinstance(v, float))
    return any(math.isinf(v) and v < 0 for v in numbers)
