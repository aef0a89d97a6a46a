"""A: the chat template does not write the answer in the way that the mask looks for it, so no row matches.

What happens in the field: a response template with one space too many, a template of another model, one that writes no
assistant turn, that rewrites the text, or that marks another turn than the answer as what is to be learnt. All labels
are masked, or the wrong ones are not. Threads: huggingface/trl#1623, InternLM/xtuner#658.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "A"
CASES = (4,)
RUNS = (("recipe_sft", "fp32"),)
_LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_OPEN, _CLOSE = "<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n"
_BODIES = {
    "drops the answer": "{% if m['role'] != 'assistant' %}" + _OPEN + "{{ m['content'] }}" + _CLOSE + "{% endif %}",
    "refuses": "{% if m['role'] == 'assistant' %}{{ raise_exception('no assistant turn here') }}{% endif %}",
    "rewrites": _OPEN + "{{ m['content'] | CHANGE }}" + _CLOSE,
    "marks nothing": _OPEN
    + "{% if m['role'] == 'assistant' %}{% generation %}{% endgeneration %}{% endif %}{{ m['content'] }}"
    + _CLOSE,
    "marks the question": _OPEN
    + "{% if m['role'] == 'user' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    + "{% else %}{{ m['content'] }}{% endif %}"
    + _CLOSE,
    "is of another model": "OPEN{{ m['role'] }}MIDDLE{{ m['content'] }}STOP",
}
_CODES = {
    "refuses": ("DAT040", "DAT012"),
    "drops the answer": ("DAT041", "DAT012"),
    "rewrites": ("DAT041", "DAT046", "DAT012", "DAT065"),
    "marks nothing": ("DAT042", "DAT046", "DAT012"),
    "marks the question": ("DAT042", "DAT046", "DAT012"),
    "is of another model": ("DAT070", "DAT071"),
}
_CHANGES = ("upper", "replace(' ', '_')", "reverse", "urlencode", "wordcount")
_MARKERS = (
    ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<start_of_turn>", "\n", "<end_of_turn>\n"),
    ("<|", "|>\n", "<|end|>\n"),
)


def plant(load: RecipeLoad, random: Random) -> Expected:
    """One of six ways, with what it writes drawn."""
    kind, change = random.choice(sorted(_BODIES)), random.choice(_CHANGES)
    opening, middle, stop = random.choice(_MARKERS)
    body = _BODIES[kind].replace("CHANGE", change)
    for name, text in (("OPEN", opening), ("MIDDLE", middle), ("STOP", stop)):
        body = body.replace(name, text)
    source = _LOOP.replace("BODY", body)
    if kind == "is of another model":
        source = source.replace("<|im_start|>assistant\n", f"{opening}assistant{middle}")
    _recipe.template(load, source)
    detail = {"rewrites": f" ({change})", "is of another model": f" ({stop.strip()})"}.get(kind, "")
    foreign = kind == "is of another model"
    return Expected(
        says=f"the chat template {kind}{detail}",
        step=0,
        codes=_CODES[kind],
        remedies=() if foreign else ("halt", "none") if kind == "rewrites" else ("halt",),
        never=("NUM", "OPT", "MOD4", "SYS"),
        reference="",
        data={"kind": kind, "template": source},
    )
