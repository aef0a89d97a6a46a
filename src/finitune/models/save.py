"""Saving: ordinary transformers and PEFT folders, whole or absent, never with NaN in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from finitune.core.errors import UserError
from finitune.core.files import atomic_folder
from finitune.models.codes import SAVE_NON_FINITE, UNKNOWN_LAYOUT
from finitune.models.family import Family
from finitune.models.library import quiet
from finitune.models.lora import adapter_state, is_adapter
from finitune.models.opening import load_any
from finitune.models.tokenizers import write_tokenizer
from finitune.models.weights import shown

HF = "hf"


def save_model(model: nn.Module, tokenizer: Any, folder: Path, *, family: Family, layout: str = HF) -> Path:
    """Write ``folder`` atomically; an existing one is replaced once the new one is complete.

    A whole model becomes a transformers folder, an adapter a PEFT folder; the tokenizer goes with both, in a form
    that transformers 4 and 5 read. ``layout`` is ``"hf"``, or the family's own name for its original layout
    (``"internlm2"``).

    Raises:
        UserError: NaN or inf in what would be saved (MOD031), a layout that cannot be written (MOD032).
        OSError: the disk refused.
    """
    folder = Path(folder)
    with atomic_folder(folder) as aside:
        write_model(model, tokenizer, aside, family=family, layout=layout)
    return folder


def write_model(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    family: Family,
    layout: str = HF,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """The same into an existing folder, for callers that put more beside it. Raises as :func:`save_model`.

    ``weights`` are written in place of the model's own parameters of these names: a copy of what trains, while
    training goes on.
    """
    _check_layout(model, family, layout)
    state = None if weights is None else _with(model, weights)
    refuse_non_finite(model, str(folder), state)
    with quiet():
        if is_adapter(model):
            # PEFT's default asks the hub whether the vocabulary was changed; it never is here.
            model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)  # type: ignore[operator]
        elif layout == HF:
            model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        else:
            _write_original(model, folder, family)
    write_tokenizer(tokenizer, folder)


def _with(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's state dict with ``weights`` in place of its parameters; tied names get the same tensor."""
    # An address alone is not enough: a parameter may be a view of the start of another.
    places = {(p.data_ptr(), p.shape): weights[name] for name, p in model.named_parameters() if name in weights}
    return {name: places.get((t.data_ptr(), t.shape), t) for name, t in model.state_dict().items()}


def layouts(family: Family) -> tuple[str, ...]:
    """The layouts that a whole model of the family can be written in."""
    return (HF, family.name) if family.export else (HF,)


def _check_layout(model: nn.Module, family: Family, layout: str) -> None:
    possible = (HF,) if is_adapter(model) else layouts(family)
    if layout not in possible:
        raise UserError(UNKNOWN_LAYOUT, "layout", layout=layout, family=family.name, possible=", ".join(possible))


def _saved(model: nn.Module, state: dict[str, torch.Tensor] | None) -> Iterator[tuple[str, torch.Tensor]]:
    """What a save would write: an adapter's own tensors, or all parameters of a whole model."""
    if is_adapter(model):
        yield from adapter_state(model, state).items()
    elif state is not None:
        yield from state.items()
    else:
        yield from model.named_parameters()


def refuse_non_finite(model: nn.Module, where: str, state: dict[str, torch.Tensor] | None = None) -> None:
    """Raise UserError MOD031 where a tensor that would be saved holds NaN or inf."""
    tensors = [(n, t.detach()) for n, t in _saved(model, state) if t.is_floating_point() and t.numel()]
    extremes = [torch.stack(t.aminmax()).float() for _, t in tensors]
    finite = torch.isfinite(torch.stack(extremes)).all(dim=1).tolist() if extremes else []
    bad = [name for (name, _), good in zip(tensors, finite, strict=True) if not good]
    if bad:
        raise UserError(SAVE_NON_FINITE, where, num=len(bad), total=len(tensors), names=shown(bad))


def _write_original(model: nn.Module, folder: Path, family: Family) -> None:
    assert family.export is not None, family.name
    config = model.config
    state = dict(model.state_dict())
    if config.tie_word_embeddings:  # type: ignore[union-attr]
        state.pop("lm_head.weight", None)
    tensors, raw = family.export(state, config)
    raw["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(whole, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def merge(model_or_folder: nn.Module | str | Path) -> Any:
    """An adapter and its base as one transformers model in the base's dtype; a whole model comes back as it is.

    A model that is given is changed: PEFT merges in place.

    Raises UserError: what :func:`load_any` raises, or NaN in the merged weights (MOD031).
    """
    model = model_or_folder if isinstance(model_or_folder, nn.Module) else load_any(str(model_or_folder)).model
    if not is_adapter(model):
        return model
    refuse_non_finite(model, "adapter")
    merged = model.merge_and_unload(progressbar=False)  # type: ignore[operator]
    refuse_non_finite(merged, "merge")
    return merged
