"""Full fine-tuning by FiniTune's own trainer, from files to files: rows in JSON lines, a model folder, checkpoints.

A tiny Llama with two decoder layers of width 32 that was trained on rows of the same kind before, 60 short
conversations, four rows a step in two micro-batches, AdamW with warm-up and cosine, a checkpoint every ten steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from finitune.bench.recipe_load import RecipeLoad
from finitune.models.family import family_for
from finitune.models.save import save_model
from finitune.models.tiny import tiny_llama, tiny_tokenizer
from finitune.numerics.seeds import generators_kept

PRECISIONS = ("fp32", "bf16", "fp16")
NEEDS = ("recipe",)
STEPS = 30
NUM_ROWS, NUM_HELD_OUT = 60, 16
_OTHER_STEPS, _OTHER_ROWS, _OTHER_LR = 80, 6, 3e-3
SETTINGS = {
    "data.max_length": "128",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "2",
    "learning_rate": "2e-3",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "3",
    "min_lr_ratio": "0.1",
    "save_steps": "10",
}
_WORDS = {
    "does": "sees|carries|paints|forgets|counts|looks for|buys|sells|holds|hides",
    "what": "six apples|a wooden box|the last train|two letters|a song|the answer|a stone|its shadow|an idea|a coat",
    "who": "a red fox|the old king|my neighbour|a small bird|the captain|nobody|a quick cat|the author|a child|a wolf",
    "where": "in the garden|by the sea|at home|under a bridge|near the mill|on a hill|at noon|in the rain|for ever",
}


def build(seed: int, precision: str, steps: int = STEPS) -> RecipeLoad:
    """The healthy run."""
    lines = conversations(Random(f"recipe/{seed}"), NUM_HELD_OUT + NUM_ROWS)
    rows, held_out = lines[NUM_HELD_OUT:], lines[:NUM_HELD_OUT]
    load = RecipeLoad("recipe_sft", precision, seed, steps, rows, held_out, dict(SETTINGS))
    with generators_kept():
        model = _untrained(seed)
        model.load_state_dict(_weights(seed))
        save_model(model, tiny_tokenizer(), load.base, family=family_for("llama"))
    return load


def conversations(random: Random, count: int) -> list[bytes]:
    """Lines of one question and one answer each, all different, of a small grammar that is learnt quickly."""
    found: dict[bytes, None] = {}
    choices = {name: words.split("|") for name, words in _WORDS.items()}
    while len(found) < count:
        part = {name: random.choice(words) for name, words in choices.items()}
        question = f"Who {part['does']} {part['what']}?"
        answer = f"{part['who']} {part['does']} {part['what']} {part['where']}."
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found[json.dumps({"messages": turns}).encode()] = None
    return list(found)


def ids_of(lines: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T) of rows, padded on the right."""
    tokenizer: Any = tiny_tokenizer()
    texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
    encoded = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    return encoded["input_ids"], encoded["attention_mask"]


def _untrained(seed: int) -> Any:
    return tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64)


@lru_cache(maxsize=32)
def _weights(seed: int) -> dict[str, Tensor]:
    """The base model: plain fp32 steps on other rows of the same grammar; trained once a process."""
    model, random = _untrained(seed), Random(f"base/{seed}")
    ids_BT, mask_BT = ids_of(conversations(random, _OTHER_STEPS * _OTHER_ROWS))
    optimizer = torch.optim.AdamW(model.parameters(), _OTHER_LR)
    model.train()
    for ids, mask in zip(torch.split(ids_BT, _OTHER_ROWS), torch.split(mask_BT, _OTHER_ROWS), strict=True):
        labels = ids.masked_fill(mask == 0, -100)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
