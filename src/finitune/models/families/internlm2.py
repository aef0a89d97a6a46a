"""InternLM2 and InternLM2.5, loaded exactly into the Llama architecture; no remote code runs.

What it loads: checkpoints whose ``config.json`` says ``internlm2``.
Why: transformers has no such class, and the model's own code does not run on transformers 5.
How: tensors are renamed, and the fused ``wqkv`` is split. Its rows are grouped by key/value head:
``view(kv_heads, G + 2, head_dim, hidden)`` with ``G = heads / kv_heads``; rows ``0..G-1`` are queries, ``G``
the key, ``G + 1`` the value. Every tensor keeps its bits, so the way back is exact too.
Source: InternLM/InternLM ``tools/convert2llama.py``; bias and RoPE scaling from ``modeling_internlm2.py``.

Shape legend: K key/value heads, G queries per key/value head, H head size, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from finitune.core.errors import UserError
from finitune.models import layout
from finitune.models.codes import SHAPE_MISMATCH
from finitune.models.family import Family, StateDict

_TO_LLAMA = {
    "tok_embeddings": "embed_tokens",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
_TO_INTERNLM2 = {new: old for old, new in _TO_LLAMA.items()}
_WQKV = re.compile(r"(?P<layer>model\.layers\.\d+)\.attention\.wqkv\.(?P<kind>weight|bias)")
_Q_PROJ = re.compile(r"(?P<layer>model\.layers\.\d+)\.self_attn\.q_proj\.(?P<kind>weight|bias)")
_KV_PROJ = re.compile(r"model\.layers\.\d+\.self_attn\.[kv]_proj\.(weight|bias)")
# Fields whose meaning is the same in both configs.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
_MODEL = re.compile(r"^model\.(?:layers\.\d+\.)?")


def _rename(name: str, table: Mapping[str, str], head: tuple[str, str]) -> str:
    if name.startswith(head[0] + "."):
        return head[1] + name[len(head[0]) :]
    prefix = _MODEL.match(name)
    start = prefix.end() if prefix else 0
    module, _, leaf = name[start:].rpartition(".")
    return f"{name[:start]}{table.get(module, module)}.{leaf}"


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(key/value heads K, queries per key/value head G, head size H)."""
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return kv_heads, heads // kv_heads, int(config["hidden_size"]) // heads


def _split(name: str, fused: torch.Tensor, config: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Rows of ``wqkv`` (K*(G+2)*H, ...) -> q (K*G*H, ...), k (K*H, ...), v (K*H, ...)."""
    kv_heads, group, size = _heads(config)
    rows = kv_heads * (group + 2) * size
    if fused.shape[0] != rows:
        expected = (rows, *fused.shape[1:])
        raise UserError(
            SHAPE_MISMATCH, name, num=1, details=f"{name}: {tuple(fused.shape)} in the file, {expected} by config.json"
        )
    grouped = fused.view(kv_heads, group + 2, size, *fused.shape[1:])
    parts = (grouped[:, :group], grouped[:, group], grouped[:, group + 1])
    return tuple(part.reshape(-1, *fused.shape[1:]).contiguous() for part in parts)


def _fuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Inverse of :func:`_split`."""
    kv_heads, group, size = _heads(config)
    rest = q.shape[1:]
    parts = [
        q.view(kv_heads, group, size, *rest),
        k.view(kv_heads, 1, size, *rest),
        v.view(kv_heads, 1, size, *rest),
    ]
    return torch.cat(parts, dim=1).reshape(-1, *rest).contiguous()


def to_llama(state: StateDict, config: Mapping[str, Any]) -> StateDict:
    """InternLM2 tensors -> Llama tensors, bit for bit. Raises UserError MOD012 where ``wqkv`` has another size."""
    out: StateDict = {}
    for name, tensor in state.items():
        fused = _WQKV.fullmatch(name)
        if not fused:
            out[_rename(name, _TO_LLAMA, ("output", "lm_head"))] = tensor
            continue
        for part, piece in zip("qkv", _split(name, tensor, config), strict=True):
            out[f"{fused['layer']}.self_attn.{part}_proj.{fused['kind']}"] = piece
    return out


def to_internlm2(state: StateDict, config: Any) -> tuple[StateDict, dict[str, Any]]:
    """Llama tensors and config -> InternLM2 tensors and ``config.json``; inverse of :func:`to_llama`."""
    raw = _internlm2_config(config)
    out: StateDict = {}
    for name, tensor in state.items():
        query = _Q_PROJ.fullmatch(name)
        if query:
            stem, kind = f"{query['layer']}.self_attn", query["kind"]
            k, v = state[f"{stem}.k_proj.{kind}"], state[f"{stem}.v_proj.{kind}"]
            out[f"{query['layer']}.attention.wqkv.{kind}"] = _fuse(tensor, k, v, raw)
        elif not _KV_PROJ.fullmatch(name):
            out[_rename(name, _TO_INTERNLM2, ("lm_head", "output"))] = tensor
    return out, raw


def llama_config(raw: Mapping[str, Any]) -> Any:
    """A LlamaConfig with the same meaning. InternLM2's ``bias`` is on the attention only; the MLP has none."""
    from transformers import LlamaConfig

    kept = {key: raw[key] for key in _SAME if key in raw}
    scaling = dict(raw.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
    rope = {**scaling, "rope_type": kind, "rope_theta": float(raw.get("rope_theta", 10000.0))}
    kept.setdefault("tie_word_embeddings", False)
    return LlamaConfig(
        **kept,
        attention_bias=bool(raw.get("bias", True)),
        mlp_bias=False,
        rope_parameters=rope,
        architectures=["LlamaForCausalLM"],
    )


def _internlm2_config(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    raw = {key: getattr(config, key) for key in _SAME}
    raw |= {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "bias": config.attention_bias,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
    }
    return raw


FAMILY = Family(
    name="internlm2",
    model_types=("internlm2",),
    groups=layout.groups,
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    backbone=layout.backbone,
    head=layout.head,
    layers=layout.layers,
    watch=layout.watch,
    config=llama_config,
    convert=to_llama,
    export=to_internlm2,
    notes="Released in bf16: prefer bf16 to fp16, and measure the fp16 headroom of the down projections.",
)
