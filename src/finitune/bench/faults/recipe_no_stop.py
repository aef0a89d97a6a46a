"""P: padding and end of answer are one token, and the template has no row supervise it.

The loss is fine, and falls; the model never learns to stop. Only the labels show it, before the first step. That the
padding is the end token is no fault by itself where masks do not look at it.
Threads: unslothai/unsloth#416, InternLM/xtuner#658, huggingface/trl#1623.
"""

from __future__ import annotations

from random import Random
from typing import Any

from finitune.bench.faults import _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "P"
CASES = (32,)
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "bf16"))
_STOP = "<|im_end|>"
_BODIES = {
    "is never written": "ROLE{{ m['content'] }}\n",
    "stands before the next turn only": "{% if not loop.first %}STOP\n{% endif %}ROLE{{ m['content'] }}",
    "stands outside what is marked": "ROLE{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}STOP\n",
}
_ROLES = ("<|im_start|>WHO\n", "### WHO:\n", "WHO: ")


def plant(load: RecipeLoad, random: Random) -> Expected:
    """The tokenizer pads with its end token; where the template writes that is drawn, and how it names the speakers."""
    way, role = random.choice(sorted(_BODIES)), random.choice(_ROLES)
    body = _BODIES[way].replace("ROLE", role.replace("WHO", "{{ m['role'] }}")).replace("STOP", _STOP)
    end = f"{_STOP}\n" if way == "stands before the next turn only" else ""
    prompt = "{% if add_generation_prompt %}" + end + role.replace("WHO", "assistant") + "{% endif %}"
    _recipe.template(load, "{% for m in messages %}" + body + "{% endfor %}" + prompt)
    _recipe.edit_json(load.base / "tokenizer_config.json", _pads_with_end)
    return Expected(
        says=f"{_STOP} pads, and {way} ({role.strip()!r})",
        step=0,
        codes=("DAT070", "DAT112", "DAT402"),
        never=("NUM", "OPT", "MOD4", "SYS"),
        reference="",
        data={"way": way},
    )


def _pads_with_end(config: dict[str, Any]) -> None:
    config["pad_token"] = config["eos_token"]
