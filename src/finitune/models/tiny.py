"""Tiny random models and a tiny tokenizer: no files, no network, the same bits for the same seed.

They stand in for real models in tests, demos and dry runs. ``tiny-internlm2`` is made in InternLM2's own
checkpoint layout and goes through the same conversion as a real checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file

from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.models.codes import BAD_TINY
from finitune.models.families.internlm2 import llama_config, to_llama
from finitune.models.family import StateDict

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ("tiny-llama", "tiny-internlm2")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A few frequent English merges, so that one token may hold several bytes as in a real tokenizer; "_" stands for
# the space, which byte-level BPE writes as U+0120.
_MERGES = tuple(
    pair.replace("_", "\u0120").split("|")
    for pair in (
        "_|t", "h|e", "i|n", "_|a", "_t|he", "o|n", "e|r", "r|e", "_|s", "a|t", "_|o", "i|s", "_|w", "e|n",
        "o|r", "_|c", "in|g", "_o|f", "e|d", "_a|n", "i|t", "_t|o", "_|f", "e|s", "a|l", "_an|d", "s|t",
    )
)  # fmt: skip
# Standard deviation of the random weights, as in LlamaConfig.
_INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class TinySpec:
    """Sizes of a tiny model. The defaults give about 133 000 parameters."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 176
    vocab: int = 320
    positions: int = 1024
    tied: int = 0
    """1: the head shares the embedding's weights."""
    bias: int = 0
    """1: attention has biases (InternLM2 only)."""
    seed: int = -1
    """Seed of the weights; -1 takes the caller's."""


def parse_name(name: str) -> tuple[str, TinySpec] | None:
    """``tiny-llama:hidden=32,layers=1`` -> (kind, spec); None where the name is no tiny model's.

    Raises UserError MOD036 for an option that does not exist or is no whole number.
    """
    kind, _, options = name.partition(":")
    if kind not in NAMES:
        return None
    known = ", ".join(f.name for f in fields(TinySpec))
    values: dict[str, int] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in TinySpec.__dataclass_fields__ or not value.lstrip("-").isdigit():
            raise UserError(BAD_TINY, name, option=option, name=kind, reason=text("models.tiny_option"), known=known)
        values[key] = int(value)
    spec = TinySpec(**values)
    if spec.vocab < _tokenizer_size() or spec.hidden % (2 * spec.heads) or spec.heads % spec.kv_heads:
        reason = text("models.tiny_sizes", vocab=_tokenizer_size())
        raise UserError(BAD_TINY, name, option=options, name=kind, reason=reason, known=known)
    return kind, spec


def canonical(kind: str, spec: TinySpec, seed: int) -> str:
    """A name that gives exactly this model again, whatever the caller's seed."""
    pinned = replace(spec, seed=seed if spec.seed < 0 else spec.seed)
    changed = [f for f in fields(TinySpec) if getattr(pinned, f.name) != f.default]
    return f"{kind}:" + ",".join(f"{f.name}={getattr(pinned, f.name)}" for f in changed)


def internlm2_config(spec: TinySpec, **extra: Any) -> dict[str, Any]:
    """A ``config.json`` as InternLM2 checkpoints have it; ``extra`` overrides fields (``rope_scaling``)."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": spec.positions,
        "initializer_range": _INIT_STD,
        "rms_norm_eps": 1e-5,
        "use_cache": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "tie_word_embeddings": bool(spec.tied),
        "bias": bool(spec.bias),
        "rope_theta": 10000.0,
        "rope_scaling": None,
        **extra,
    }


def internlm2_state(spec: TinySpec, seed: int) -> StateDict:
    """Random fp32 tensors under InternLM2's names and shapes; the global random state is not touched."""
    generator = torch.Generator().manual_seed(seed if spec.seed < 0 else spec.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * _INIT_STD

    size = spec.hidden // spec.heads
    fused = (spec.heads + 2 * spec.kv_heads) * size
    state = {
        "model.tok_embeddings.weight": normal(spec.vocab, spec.hidden),
        "model.norm.weight": torch.ones(spec.hidden),
    }
    for index in range(spec.layers):
        stem = f"model.layers.{index}"
        state[f"{stem}.attention.wqkv.weight"] = normal(fused, spec.hidden)
        state[f"{stem}.attention.wo.weight"] = normal(spec.hidden, spec.hidden)
        if spec.bias:
            state[f"{stem}.attention.wqkv.bias"] = normal(fused)
            state[f"{stem}.attention.wo.bias"] = normal(spec.hidden)
        state[f"{stem}.feed_forward.w1.weight"] = normal(spec.mlp, spec.hidden)
        state[f"{stem}.feed_forward.w3.weight"] = normal(spec.mlp, spec.hidden)
        state[f"{stem}.feed_forward.w2.weight"] = normal(spec.hidden, spec.mlp)
        state[f"{stem}.attention_norm.weight"] = torch.ones(spec.hidden)
        state[f"{stem}.ffn_norm.weight"] = torch.ones(spec.hidden)
    if not spec.tied:
        state["output.weight"] = normal(spec.vocab, spec.hidden)
    return state


def tiny_internlm2(seed: int = 0, **sizes: int) -> LlamaForCausalLM:
    """A tiny InternLM2, made in its own layout and converted; fp32, eval mode."""
    return _converted(TinySpec(**sizes), seed)


def tiny_llama(seed: int = 0, **sizes: int) -> LlamaForCausalLM:
    """A tiny Llama; fp32, eval mode. ``sizes`` are the fields of :class:`TinySpec`, without ``bias``."""
    return _converted(TinySpec(**{**sizes, "bias": 0}), seed)


def build(kind: str, spec: TinySpec, seed: int) -> LlamaForCausalLM:
    """The model of a parsed name."""
    return _converted(spec if kind == "tiny-internlm2" else replace(spec, bias=0), seed)


def _converted(spec: TinySpec, seed: int) -> LlamaForCausalLM:
    from transformers import LlamaForCausalLM

    raw = internlm2_config(spec)
    state = to_llama(internlm2_state(spec, seed), raw)
    with torch.random.fork_rng(devices=[]):
        model: Any = LlamaForCausalLM(llama_config(raw))
    if spec.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.eval()
    return cast("LlamaForCausalLM", model)


def write_internlm2_folder(folder: Path, *, spec: TinySpec | None = None, seed: int = 0, **config: Any) -> Path:
    """Write a checkpoint in InternLM2's own layout: config.json, model.safetensors and a tokenizer.

    ``config`` overrides fields of config.json, for example ``rope_scaling={"type": "dynamic", "factor": 2.0}``.
    """
    spec = spec or TinySpec()
    folder.mkdir(parents=True, exist_ok=True)
    raw = internlm2_config(spec, **config)
    (folder / "config.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    save_file(internlm2_state(spec, seed), str(folder / "model.safetensors"), metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 27 merges and a ChatML template: 287 ids, every text survives the round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, *("".join(pair) for pair in _MERGES)]
    bpe = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[(a, b) for a, b in _MERGES])
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    pad, end_of_text, im_start, im_end = SPECIALS
    untyped: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = untyped(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=end_of_text,
        eos_token=im_end,
        additional_special_tokens=[im_start],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def _tokenizer_size() -> int:
    return len(SPECIALS) + 256 + len(_MERGES)
