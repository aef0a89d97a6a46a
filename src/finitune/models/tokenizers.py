"""Tokenizers: found, read without remote code, proved against SentencePiece, written for old readers too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finitune.core.errors import UserError
from finitune.core.types import Finding
from finitune.models.codes import (
    CHATML_GIVEN,
    NO_CHAT_TEMPLATE,
    NO_SENTENCEPIECE,
    NO_TOKENIZER,
    TOKENIZER_DIFFERS,
    TOKENIZER_TOO_LARGE,
)
from finitune.models.library import quiet
from finitune.models.tiny import CHATML

# InternLM2's chats are ChatML behind a beginning-of-sequence token (InternLM/InternLM: chat/chat_format.md).
INTERNLM2_CHATML = "{{ bos_token }}" + CHATML
_CONFIG = "tokenizer_config.json"
# Texts on which a converted tokenizer must agree with SentencePiece: spaces, lines, tabs, digits, scripts, bytes.
_PROBES = (
    "Hello world",
    "  two spaces\n\nand\tlines ",
    "def f(x):\n    return x**2 + 3.14159",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 1234567890",
    "\u0421\u043b\u043e\u0432\u043e caf\u00e9 \U0001f600 \u0e44\u0e17\u0e22",
)
# Written by transformers 5 and unknown or differently typed in transformers 4.
_V5_ONLY = ("backend", "is_local", "local_files_only")


def load_tokenizer(folder: Path, model_type: str, chat_template: str | None = None) -> tuple[Any, list[Finding]]:
    """The tokenizer of a model folder, and notes about it. Code in the folder is never run.

    Raises:
        UserError: none that can be read (MOD019), SentencePiece not installed (MOD020), a conversion that is
            not exact (MOD021), a template file that is absent (MOD034).
    """
    native = model_type != "internlm2"
    notes: list[Finding] = []
    with quiet():
        if (folder / "tokenizer.json").is_file() or native:
            tokenizer = _read_fast(folder, native=native)
        elif (folder / "tokenizer.model").is_file():
            tokenizer = _from_sentencepiece(folder)
        else:
            raise UserError(NO_TOKENIZER, str(folder), reason="neither tokenizer.json nor tokenizer.model is there")
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
    elif tokenizer.chat_template is None and not native and "<|im_start|>" in tokenizer.get_vocab():
        tokenizer.chat_template = INTERNLM2_CHATML
        notes.append(CHATML_GIVEN.find(str(folder)))
    return tokenizer, notes


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds any tokenizer file."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", _CONFIG))


def size_findings(tokenizer: Any, rows: int) -> list[Finding]:
    """A warning where the tokenizer can give an id that has no row in the embedding."""
    max_id = max(tokenizer.get_vocab().values(), default=0)
    return [] if max_id < rows else [TOKENIZER_TOO_LARGE.find("tokenizer", max_id=max_id, num_rows=rows)]


def _template(given: str) -> str:
    """A Jinja text, or the content of the file that ``given`` names."""
    if "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(NO_CHAT_TEMPLATE, given, reason=str(error)) from error


def _read_fast(folder: Path, *, native: bool) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if native:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise UserError(NO_SENTENCEPIECE, str(folder), reason=str(error).split("\n")[0]) from error
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise UserError(NO_TOKENIZER, str(folder), reason=str(error).split("\n")[0]) from error


def _from_sentencepiece(folder: Path) -> Any:
    """InternLM2's ``tokenizer.model`` through transformers' Llama conversion, proved on probes.

    The conversion does not look at the file's own ``add_dummy_prefix``: without it every text that does not
    begin with a space gets other ids, so it is read here and passed on.
    """
    from transformers import LlamaTokenizer

    path = folder / "tokenizer.model"
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except (ImportError, TypeError) as error:  # protobuf's version check raises its own subclass of these
        raise UserError(NO_SENTENCEPIECE, str(path), reason=str(error).split("\n")[0]) from error
    try:
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(path.read_bytes())
        reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
        prefix = bool(proto.normalizer_spec.add_dummy_prefix)
        bos = _wants_bos(folder)
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_prefix_space=prefix, add_bos_token=bos)
    except Exception as error:  # protobuf and SentencePiece raise their own types for a broken file
        raise UserError(NO_TOKENIZER, str(path), reason=str(error).split("\n")[0]) from error
    _prove(tokenizer, reference, path)
    return tokenizer


def _wants_bos(folder: Path) -> bool:
    """InternLM2's tokenizer begins plain text with BOS unless its configuration says otherwise."""
    path = folder / _CONFIG
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return bool(raw.get("add_bos_token", True))


def _prove(tokenizer: Any, reference: Any, path: Path) -> None:
    for sample in _PROBES:
        ours, theirs = tokenizer(sample, add_special_tokens=False).input_ids, reference.encode(sample)
        if ours != theirs:
            raise UserError(TOKENIZER_DIFFERS, str(path), sample=sample, ours=ours[:8], theirs=theirs[:8])


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save so that transformers 5 and 4 both read it.

    transformers 5 writes a class name, a list of extra tokens and a separate template file that 4 does not
    know; here the class is ``PreTrainedTokenizerFast`` and the template is in tokenizer_config.json as well.
    """
    tokenizer.save_pretrained(folder)
    path = folder / _CONFIG
    raw = json.loads(path.read_text(encoding="utf-8"))
    if (folder / "tokenizer.json").is_file():
        raw["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = raw.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        raw["additional_special_tokens"] = extra
    elif extra:
        raw["extra_special_tokens"] = extra
    for key in (*_V5_ONLY, "auto_map"):
        raw.pop(key, None)
    if tokenizer.chat_template is not None:
        raw["chat_template"] = tokenizer.chat_template
    path.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
