"""Open whatever lies at a path: a model, an adapter with its base, a GGUF file, or the folder of a run."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.models import gguf
from finitune.models.codes import BAD_ADAPTER, MODEL_NOT_FOUND
from finitune.models.load import Loaded, load
from finitune.models.lora import ADAPTER_CONFIG, adapter_base, open_adapter
from finitune.models.tokenizers import has_tokenizer, load_tokenizer

_STEP = re.compile(r"checkpoint-(\d+)")


def load_any(path: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Loaded:
    """Load for chat or export: names that :func:`~finitune.models.load.load` knows, adapter folders, run folders.

    The folder of a run stands for its ``final`` model, else for its latest checkpoint.

    Raises UserError: as :func:`~finitune.models.load.load` and :func:`~finitune.models.lora.open_adapter`.
    """
    folder = Path(path).expanduser()
    if os.path.isdir(folder) and not _is_model(folder):
        folder = _inside(folder)
        path = str(folder)
    if os.path.isfile(folder / ADAPTER_CONFIG):
        return _adapter(folder, dtype, device)
    return load(path, dtype=dtype, device=device)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def _inside(run: Path) -> Path:
    """``final``, else the checkpoint with the highest step; the folder itself where there is neither."""
    if _is_model(run / "final"):
        return run / "final"
    steps = [(int(m[1]), p) for p in run.iterdir() if (m := _STEP.fullmatch(p.name)) and _is_model(p)]
    return max(steps)[1] if steps else run


def _adapter(folder: Path, dtype: torch.dtype, device: str) -> Loaded:
    base_name = adapter_base(folder)
    if not Path(base_name).exists():
        base_name = gguf.packaged_name(base_name) or base_name
    try:
        base = load(base_name, dtype=dtype, device=device)
    except UserError as error:
        if error.code is not MODEL_NOT_FOUND:
            raise
        reason = text("models.base_gone", base=base_name)
        raise UserError(BAD_ADAPTER, str(folder), reason=reason) from error
    model = open_adapter(base.model, folder)
    tokenizer = load_tokenizer(folder, "llama")[0] if has_tokenizer(folder) else base.tokenizer
    return replace(base, model=model, tokenizer=tokenizer, source=str(folder))
