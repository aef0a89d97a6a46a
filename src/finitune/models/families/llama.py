"""Llama and the dense decoders that transformers lays out like it.

What it loads: Llama, SmolLM2/3, Mistral, Ministral, Qwen2, Qwen3, InternLM3, Gemma 1-3 (text), OLMo 1-3,
Granite, Cohere, Helium, StableLM, Seed-OSS, EXAONE 4, ERNIE 4.5, HunYuan dense, Phi (the fused Phi-3 and
GLM-4 are left out: their linear modules have other names).
Why one member: all of them are ``model.layers[i].{self_attn,mlp.down_proj}`` and ``lm_head``.
"""

from finitune.models import layout
from finitune.models.family import Family

FAMILY = Family(
    name="llama",
    model_types=(
        "llama",
        "smollm3",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "internlm3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo",
        "olmo2",
        "olmo3",
        "granite",
        "cohere",
        "cohere2",
        "helium",
        "stablelm",
        "seed_oss",
        "exaone4",
        "ernie4_5",
        "hunyuan_v1_dense",
    ),
    groups=layout.groups,
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    backbone=layout.backbone,
    head=layout.head,
    layers=layout.layers,
    watch=layout.watch,
    config=layout.native_config,
    notes="Trained in bf16 as a rule: prefer bf16 to fp16, and measure the fp16 headroom of the down projections.",
)
