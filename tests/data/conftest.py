"""Small tokenizers with the chat templates of several model families, and files to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<|user|>", "<|assistant|>"),
)
# Every word of the hand-written conversations is one token; anything else falls apart into bytes.
WORDS = "user assistant system model tool Hello there Hi friend How are you Fine thanks Be kind think INST SYS Response"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: dict[str, tuple[str, dict[str, str]]] = {
    "chatml": (CHATML, {"eos_token": "<|im_end|>"}),
    "internlm2": ("{{ bos_token }}" + CHATML, {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
        "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        {"bos_token": "<bos>", "eos_token": "<end_of_turn>"},
    ),
    "zephyr_generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}"
        "{% generation %}{{ m.content + eos_token + '\n' }}{% endgeneration %}"
        "{% else %}{{ '<|user|>\n' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        {"eos_token": "</s>"},
    ),
    # Ignores add_generation_prompt although turns have a header.
    "chatml_without_prompt": (CHATML.partition("{% if add")[0], {"eos_token": "<|im_end|>"}),
    # As Qwen3: the thinking of earlier answers is taken out of the history.
    "rewrites_history": (
        "{% for m in messages %}{% set body = m.content %}"
        "{% if m.role == 'assistant' and not loop.last %}{% set body = body.split('</think>')[-1].lstrip('\n') %}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + body + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        {"eos_token": "<|im_end|>"},
    ),
    # No end token, and the generation prompt ends in a space that tokenises together with the answer.
    "plain_with_space": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        {"eos_token": "</s>"},
    ),
    # Knows user and assistant, prints nothing for others.
    "silent_about_tools": (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        {"eos_token": "<|im_end|>"},
    ),
}


@cache
def _backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [form.format(w) for w in WORDS.split() for form in ("{0}", " {0}")]
    backend.train_from_iterator(lines * 3, trainer)
    return str(backend.to_str())


def build(name: str | None) -> PreTrainedTokenizerFast:
    """A fresh tokenizer; ``name`` of a template, or None for one without."""
    template, special = TEMPLATES[name] if name else (None, {"eos_token": "</s>"})
    backend = Tokenizer.from_str(_backend())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_for() -> Callable[[str | None], Any]:
    return build


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data beside the project; the test is skipped where it is absent."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a file: text, bytes, or rows as JSON lines (.jsonl) or one list (.json); gives its path."""

    def write_file(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(r) + "\n" for r in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return str(path)

    return write_file


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="session")
def conversation() -> Callable[..., dict[str, Any]]:
    """A row of OpenAI messages from (role, content) pairs."""
    return chat
