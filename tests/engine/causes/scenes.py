"""Cases as the experiments leave them: one scene for each cause, and the recipes of the counterfactual matrix."""

from __future__ import annotations

import math
from typing import Any

from finitune.core.incident import Evidence, Result, Suspect, Trigger, Verdict
from finitune.core.types import Finding, Reading, Severity
from finitune.engine.case import Case

ROW = "data.jsonl:7#0123456789ab"
FP16 = {
    "precision": "fp16",
    "half_max": 65504.0,
    "weights": ["float32"],
    "attention": "sdpa",
    "lr": 1e-3,
    "num_units": 4,
}
FP32 = {**FP16, "precision": "fp32", "half_max": None}
PURE = {**FP16, "weights": ["float16"], "adam_eps": 1e-8, "optimizer": "AdamW"}


def evidence(good: str = "", bad: str = "", **numbers: dict[str, Any]) -> dict[str, Evidence]:
    """Experiments that cured, and that did not; their numbers by name."""
    found = {}
    for names, result in ((good, Result.GOOD), (bad, Result.BAD)):
        for name in names.split():
            found[name] = Evidence(name, result, numbers.get(name, {}), 1.0)
    return found


def case(trigger: Trigger = Trigger.LOSS, facts: dict[str, Any] | None = None, **fields: Any) -> Case:
    """A case of some kind; ``loss``, ``grad_norm`` and other fields of the reading by name."""
    names = ("loss", "grad_norm", "step", "loss_scale", "supervised_tokens", "changed_fraction", "amax", "lr")
    nan = math.nan
    usual = {"loss": nan if trigger is Trigger.LOSS else 2.3, "grad_norm": 1.0, "step": 130, "lr": 1e-3}
    if trigger in (Trigger.LOSS, Trigger.GRADIENT, Trigger.SCALE):
        usual["grad_norm"] = nan
    usual |= {n: fields.pop(n) for n in names if n in fields}
    finding = fields.pop("finding", Finding("NUM001", Severity.ERROR, "", {}, veto=True))
    rest: dict[str, Any] = {"past": {"median_loss": 2.4, "median_grad_norm": 1.0, "updates": 129, "incidents": []}}
    rest |= {"verdict": Verdict.REPRODUCED, "suspects": (), "evidence": {}} | fields
    return Case(trigger, finding, Reading(**usual), FP32 if facts is None else facts, **rest)  # type: ignore[arg-type]


def at(module: str, op: str, phase: str = "forward", **data: Any) -> tuple[Suspect, ...]:
    """What the localisation names: a module (where it is one) and an operation in it."""
    node = op if phase == "backward" else None
    detail = {
        "module": module,
        "op": op,
        "node": node,
        "phase": phase,
        "input_finite": True,
        "dtype": "float32",
        **data,
    }
    whole = () if module.startswith("(") else (Suspect("module", module, detail),)
    return (*whole, Suspect("op", f"{op} in {module}", detail))


def row_found(**more: Any) -> dict[str, Any]:
    return {"rows": [ROW], "num_bad": 1, "num_units": 4, "rest_good": True, **more}


DOWN = "model.layers.11.mlp.down_proj"
OVERFLOW = at(DOWN, "aten.mm.default", dtype="float16", amax=math.inf, value=65822.0, input_amax=4348.0)
SPOILT = Suspect("parameter", "w", {"what": "update", "value": math.nan})
COURSE = {"start_step": 121, "median_loss": 2.4, "losses_half": [2.5], "losses_tenth": [2.4], "losses_same": [9.0]}
WIDE = {"lower_lr": COURSE, "tighter_clip": {"start_step": 121, "max_grad_norm": 0.5, "losses": [2.4]}}


def bad_before(kind: str, name: str, since: int | None, **data: Any) -> Suspect:
    what = {"parameter": "weight"}.get(kind, kind)
    told = {"what": what, "since_step": since, "since_exact": True, "frozen": False, "index": [17, 3], "row": 17}
    return Suspect(kind, name, {**told, "value": math.inf, **data})


def silent(code: str, **data: Any) -> Case:
    """A check filed what it found under the code of a cause."""
    return case(Trigger.SILENT, finding=Finding(code, Severity.WARNING, "", data))


OF_CAUSES: dict[str, Case] = {
    "nothing_supervised": case(
        grad_norm=0.0, supervised_tokens=0, evidence=evidence("scan_state known_good_batch", "supervised_tokens")
    ),
    "forward_overflow": case(
        facts=FP16,
        suspects=OVERFLOW,
        evidence=evidence("scan_state fp32 bf16 islands", "known_good_batch", islands={"modules": [DOWN]}),
    ),
    "backward_overflow": case(
        Trigger.SCALE,
        FP16,
        loss_scale=256.0,
        suspects=at(DOWN, "MmBackward0", "backward", dtype="float16"),
        evidence=evidence(
            "scan_state fp32 loss_scales", "", loss_scales={"good_at": [1.0], "bad_at": [256.0, 65536.0]}
        ),
    ),
    "half_optimizer": case(
        Trigger.UPDATE, PURE, step=1, suspects=(SPOILT,), evidence=evidence("scan_state adam_eps", "fresh_moments")
    ),
    "masked_row": case(
        suspects=at("model.layers.0.self_attn", "aten._softmax.default"),
        evidence=evidence("scan_state known_good_batch rows", "math_attention", rows=row_found()),
    ),
    "attention_kernel": case(
        Trigger.GRADIENT,
        suspects=at("model.layers.0.self_attn", "ScaledDotProductEfficientAttentionBackward0", "backward"),
        evidence=evidence("scan_state math_attention", "known_good_batch"),
    ),
    "not_reproducible": case(
        verdict=Verdict.NOT_REPRODUCED,
        evidence=evidence("same_again", same_again={"num_tries": 3, "num_bad": 0, "loss": 2.2}),
    ),
    "bad_weights": case(
        suspects=(bad_before("parameter", "model.embed_tokens.weight", None),),
        evidence=evidence("known_good_batch rows", "scan_state fp32 older_weights", rows=row_found()),
    ),
    "learning_rate": case(
        Trigger.RUNAWAY,
        loss=9.0,
        evidence=evidence("scan_state lower_lr", "tighter_clip known_good_batch", **WIDE),
    ),
    "corrupt_state": case(
        suspects=(bad_before("parameter", "model.layers.1.mlp.up_proj.weight", 120),),
        evidence=evidence("older_weights", "scan_state known_good_batch", older_weights={"good": [119, 118]}),
    ),
    "harmless_outlier": case(
        Trigger.OUTLIER,
        loss=9.1,
        finding=Finding("NUM010", Severity.WARNING, "", {"limit": 5.0}),
        evidence=evidence("scan_state known_good_batch let_pass rows", "", rows=row_found()),
    ),
    "lost_updates": case(
        Trigger.SILENT, {**FP32, "precision": "bf16-pure", "weights": ["bfloat16"]}, changed_fraction=0.005, lr=1e-5
    ),
    "loss_math": case(
        Trigger.GRADIENT,
        suspects=at("(loss)", "SqrtBackward0", "backward"),
        evidence=evidence("scan_state known_good_batch rows", "fp32", rows=row_found()),
    ),
    "loss_normalisation": silent("OPT403", ratio=1.3, cosine=0.71),
    "no_gradient": case(Trigger.SILENT, grad_norm=0.0, supervised_tokens=40),
    "bad_row": case(
        suspects=(Suspect("input", "pixel_values", {"num_bad": 1}),),
        evidence=evidence("scan_state known_good_batch rows", "fp32", rows=row_found()),
    ),
    "vocabulary": case(
        Trigger.OUTLIER,
        loss=141.0,
        step=1,
        suspects=(
            *at("model.embed_tokens", "aten.embedding.default", amax=900.0),
            Suspect("tokens", ROW, {"span": [3, 4]}),
        ),
        evidence=evidence("scan_state known_good_batch rows", "let_pass", rows=row_found()),
    ),
    "stop_token": silent("DAT402", share="0 %", rows=5000),
    "router": case(
        facts=FP16,
        suspects=at("model.layers.3.mlp.gate", "aten.mm.default", dtype="float16"),
        evidence=evidence("scan_state fp32 islands", "bf16", islands={"modules": ["model.layers.3.mlp.gate"]}),
    ),
    "optimizer_bug": case(
        Trigger.UPDATE,
        suspects=(SPOILT,),
        evidence=evidence("scan_state reference_optimizer", "fresh_moments", reference_optimizer={"parameter": "w"}),
    ),
    "wrong_precision": case(
        suspects=at("model.layers.4.mlp.down_proj", "aten.mm.default", dtype="float16"),
        evidence=evidence("scan_state fp32"),
    ),
    "resume_state": case(
        Trigger.UPDATE,
        {**FP32, "resumed_step": 125},
        evidence=evidence("scan_state fresh_moments", "reference_optimizer"),
    ),
    "model_math": case(
        suspects=(
            *at("model.layers.0.q_proj.dora", "aten.div.Tensor"),
            Suspect("parameter", "w", {"row": 3, "row_amax": 0.0}),
        ),
        evidence=evidence("scan_state", "fp32 rows known_good_batch"),
    ),
    "exploding_gradient": case(
        Trigger.GRADIENT,
        suspects=at("model.layers.0.self_attn.k_proj", "MmBackward0", "backward"),
        evidence=evidence("scan_state tighter_clip older_weights", "fp32 lower_lr known_good_batch", **WIDE),
    ),
}

# FACTS part 2, section 6: the recipes, with what each probe showed there.
OF_RECIPES: dict[str, tuple[Case, str]] = {
    "A": (OF_CAUSES["forward_overflow"], "forward_overflow"),
    "A, half the rate puts it off": (
        case(
            facts=FP16,
            suspects=OVERFLOW,
            evidence=evidence("fp32 bf16 lower_lr older_weights", "known_good_batch", **WIDE),
        ),
        "forward_overflow",
    ),
    "B": (
        case(
            Trigger.GRADIENT,
            suspects=at("model.layers.0.self_attn.k_proj", "MmBackward0", "backward", input_amax=2.3e30),
            evidence=evidence(
                "scan_state older_weights lower_lr", "fp32 bf16 known_good_batch rows tighter_clip", **WIDE
            ),
        ),
        "learning_rate",
    ),
    "C": (OF_CAUSES["bad_weights"], "bad_weights"),
    "C2": (OF_CAUSES["nothing_supervised"], "nothing_supervised"),
    "D": (OF_CAUSES["exploding_gradient"], "exploding_gradient"),
    "D2": (OF_CAUSES["loss_math"], "loss_math"),
    "E": (OF_CAUSES["half_optimizer"], "half_optimizer"),
}
