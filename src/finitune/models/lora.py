"""LoRA adapters through PEFT: checked before they are attached, deterministic, and always in fp32.

PEFT takes seconds to import, so it is imported inside the functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from finitune.core.errors import UserError, raise_all
from finitune.core.messages.catalogue import text
from finitune.models.codes import (
    BAD_ADAPTER,
    BAD_LORA,
    DORA_ZERO_ROW,
    NO_WEIGHTS,
    NON_FINITE_WEIGHTS,
    TARGET_NOT_FOUND,
)
from finitune.models.family import Family
from finitune.models.layout import bare
from finitune.models.library import quiet
from finitune.models.lora_fused import fuse
from finitune.models.weights import listing, read_state, scan, shown
from finitune.numerics.seeds import generators_seeded

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Hu et al. 2021 (LoRA), with DoRA (Liu et al. 2024) and rsLoRA (Kalajdzievski 2023) as switches."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "auto"
    """"auto" (the family's linear modules), "all-linear", or ends of module names."""
    use_dora: bool = False
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapters and saved with them."""
    init_seed: int = 0


def attach(model: nn.Module, settings: LoraSettings, family: Family) -> PeftModel:
    """Freeze the model and put adapters on the targeted linear modules; adapter weights are fp32.

    The start is a function of ``init_seed`` alone; the global random state is not touched. The model itself is
    changed (PEFT replaces its modules).

    Raises:
        UserError, UserErrors: settings out of range (MOD027), targets or modules_to_save that match nothing
            (MOD026), rows of zeros under DoRA (MOD028).
    """
    from peft import LoraConfig, get_peft_model

    raise_all(_range_faults(settings))
    targets = _targets(settings, family)
    hits = _targeted(model, targets)
    raise_all(_match_faults(model, settings, targets))
    if settings.use_dora:
        raise_all(_zero_rows(hits))
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        modules_to_save=list(settings.modules_to_save) or None,
        ensure_weight_tying=_saves_tied(model, settings.modules_to_save),
        task_type="CAUSAL_LM",
    )
    with generators_seeded(settings.init_seed), quiet():
        wrapped = get_peft_model(model, config)
    _widen_saved_modules(wrapped)
    fuse(wrapped)
    return cast("PeftModel", wrapped)


def _range_faults(settings: LoraSettings) -> list[UserError]:
    rules = (
        ("r", settings.r, settings.r >= 1, ">= 1"),
        ("lora_alpha", settings.alpha, 0 < settings.alpha < float("inf"), "> 0"),
        ("lora_dropout", settings.dropout, 0 <= settings.dropout < 1, ">= 0, < 1"),
    )
    return [
        UserError(BAD_LORA, "lora", field=name, value=value, rule=rule) for name, value, good, rule in rules if not good
    ]


def _targets(settings: LoraSettings, family: Family) -> str | tuple[str, ...]:
    given = settings.targets
    if given == "auto":
        return family.lora_targets
    return given if given == "all-linear" or not isinstance(given, str) else (given,)


def _ends_with(name: str, end: str) -> bool:
    """PEFT's own rule for a list of targets."""
    return name == end or name.endswith("." + end)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _targeted(model: nn.Module, targets: str | tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear modules that ``targets`` means; all-linear leaves the head out, as PEFT does."""
    linears = _linears(model)
    if isinstance(targets, str):
        return {name: module for name, module in linears.items() if not _ends_with(name, "lm_head")}
    return {name: module for name, module in linears.items() if any(_ends_with(name, t) for t in targets)}


def _match_faults(model: nn.Module, settings: LoraSettings, targets: str | tuple[str, ...]) -> list[UserError]:
    """One error for each name that matches nothing. PEFT complains only where *no* target matches."""
    linears = list(_linears(model))
    everything = [name for name, _ in model.named_modules() if name]
    asked = [("lora.target_modules", t, linears) for t in (() if isinstance(targets, str) else targets)]
    asked += [("lora.modules_to_save", m, everything) for m in settings.modules_to_save]
    return [
        _no_match(where, name, known) for where, name, known in asked if not any(_ends_with(k, name) for k in known)
    ]


def _no_match(where: str, target: str, names: list[str]) -> UserError:
    leaves = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    close = get_close_matches(target.rpartition(".")[2], leaves, n=3, cutoff=0.5)
    return UserError(TARGET_NOT_FOUND, where, target=target, close=", ".join(close) or "-", existing=", ".join(leaves))


def _zero_rows(hits: Mapping[str, nn.Linear]) -> list[UserError]:
    """DoRA's norm is taken over the inputs of each output row; it divides by it."""
    found = []
    for name, module in hits.items():
        norms = torch.linalg.vector_norm(module.weight.detach().float(), dim=1)
        rows = (~(norms > 0)).nonzero().flatten().tolist()
        if rows:
            found.append(f"{name} row {rows[0]}" + (f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""))
    return [UserError(DORA_ZERO_ROW, "lora.use_dora", num=len(found), details=shown(found))] if found else []


def _saves_tied(model: nn.Module, modules: tuple[str, ...]) -> bool:
    """Whether a tied embedding or head is trained whole; PEFT then has to keep the two one tensor."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    return any(_ends_with(name, module) for name in names for module in modules)


def _widen_saved_modules(model: nn.Module) -> None:
    """Train whole modules in fp32 too: half-precision weights lose small updates and break the optimizer.

    The module then takes and gives the dtype of the model around it.
    """
    from peft.utils import ModulesToSaveWrapper

    for wrapper in [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]:
        for copy in wrapper.modules_to_save.values():
            around = next(copy.parameters()).dtype
            if around in _HALF:
                copy.float()
                copy.register_forward_pre_hook(_to_fp32)
                copy.register_forward_hook(_back_to(around))


def _to_fp32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
    return tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype in _HALF else a for a in args)


def _back_to(dtype: torch.dtype) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        return output.to(dtype)

    return hook


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter weights of ``folder`` into a model that already carries such an adapter.

    Raises UserError: no adapter there (MOD006), cut short (MOD008), NaN or inf (MOD013), other keys or shapes (MOD025).
    """
    from peft import set_peft_model_state_dict

    state = _read_adapter(folder)
    _check_fit(model, state, folder)
    set_peft_model_state_dict(model, state)


def adapter_state(model: nn.Module, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The tensors that an adapter folder of this model holds, by their names there; ``state`` stands for its own."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False))


def _read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(NO_WEIGHTS, str(folder), found=listing(folder))
    state = read_state([path])
    if bad := scan(state).non_finite:
        raise UserError(NON_FINITE_WEIGHTS, str(path), num=len(bad), details=shown(bad))
    return state


def _check_fit(model: nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    expected = {name: tuple(t.shape) for name, t in adapter_state(model).items()}
    given = {name: tuple(t.shape) for name, t in state.items()}
    missing = sorted(expected.keys() - given.keys())
    extra = sorted(given.keys() - expected.keys())
    misfit = sorted(n for n in expected.keys() & given.keys() if expected[n] != given[n])
    if missing or extra or misfit:
        reason = text(
            "models.adapter_keys",
            missing=len(missing),
            first_missing=shown(missing) or "-",
            unexpected=len(extra) + len(misfit),
            first_unexpected=shown([*extra, *(f"{n} {given[n]} != {expected[n]}" for n in misfit)]) or "-",
        )
        raise UserError(BAD_ADAPTER, str(folder), reason=reason)


def open_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """The model with the adapter of ``folder`` on it, not trainable, eval mode. Raises as :func:`load_adapter`."""
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(str(folder))
        with quiet():
            wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(BAD_ADAPTER, str(folder), reason=str(error).split("\n")[0]) from error
    load_adapter(wrapped, folder)
    wrapped.requires_grad_(False)
    fuse(wrapped)
    wrapped.eval()
    return cast("PeftModel", wrapped)


def adapter_base(folder: Path) -> str:
    """The name of the base model in ``adapter_config.json``. Raises UserError MOD004 or MOD025."""
    path = folder / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(BAD_ADAPTER, str(path), reason=str(error)) from error
    if not base:
        raise UserError(BAD_ADAPTER, str(path), reason=text("models.no_base"))
    return str(base)


def is_adapter(model: nn.Module) -> bool:
    """Whether PEFT wraps the model."""
    return bare(model) is not model
