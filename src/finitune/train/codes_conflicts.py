"""Codes of the recipe: settings that contradict each other, or do nothing."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

BOTH_HALVES = Code(
    "CFG011",
    Severity.ERROR,
    Text(
        "fp16 and bf16 both asked for",
        "fp16 and bf16 are both true.",
        "They are two different half formats; a run computes in one of them.",
        (
            "Keep bf16: true where the device computes it (no overflow at 65504), else fp16: true.",
            "Or remove both and let `precision: auto` choose.",
        ),
    ),
    Text(
        "同时要求 fp16 和 bf16",
        "fp16 和 bf16 同时为 true。",
        "它们是两种不同的半精度格式，一次训练只能用一种。",
        (
            "设备支持时保留 bf16: true（不会在 65504 溢出），否则保留 fp16: true。",
            "或者都删掉，由 `precision: auto` 选择。",
        ),
    ),
)
PRECISION_CONFLICT = Code(
    "CFG012",
    Severity.ERROR,
    Text(
        "precision contradicts a flag",
        "precision is {precision}, but {flag} is {value}.",
        "The flags fp16 and bf16 are another spelling of precision; both given, they must agree.",
        ("Remove {flag}, or set `precision: auto` and keep {flag}.",),
    ),
    Text(
        "precision 与标志矛盾",
        "precision 是 {precision}，但 {flag} 是 {value}。",
        "fp16 和 bf16 标志是 precision 的另一种写法；同时给出时必须一致。",
        ("删除 {flag}，或设 `precision: auto` 并保留 {flag}。",),
    ),
)
PURE_FP16 = Code(
    "CFG013",
    Severity.ERROR,
    Text(
        "pure fp16 training is refused",
        "precision {value} would keep the weights and Adam's moments in fp16.",
        "In fp16 an update smaller than 1/2048 of a weight is lost, and adam_epsilon 1e-8 rounds to 0, "
        "so that the optimiser itself makes the first NaN.",
        (
            "Use `precision: fp16`: weights in fp32, products in fp16, gradients scaled.",
            "To save memory use `precision: bf16-pure`, or LoRA.",
        ),
    ),
    Text(
        "拒绝纯 fp16 训练",
        "precision {value} 会把权重和 Adam 动量保存为 fp16。",
        "在 fp16 中，小于权重 1/2048 的更新会丢失，而 adam_epsilon 1e-8 会舍入为 0，于是优化器自己就会产生第一个 NaN。",
        (
            "使用 `precision: fp16`：权重为 fp32，乘法用 fp16，并缩放梯度。",
            "要节省内存，请用 `precision: bf16-pure` 或 LoRA。",
        ),
    ),
)
SCHEDULE_TOO_LONG = Code(
    "CFG015",
    Severity.ERROR,
    Text(
        "warm-up and decay do not fit into the run",
        "{part} is {value}, but {limit_name} leaves room for {limit}.",
        "The learning rate would never reach its full value.",
        ("Make {part} smaller.",),
    ),
    Text(
        "预热和衰减放不进训练",
        "{part} 是 {value}，但 {limit_name} 只留出 {limit}。",
        "学习率永远达不到设定值。",
        ("减小 {part}。",),
    ),
)
FREEZE_WITH_LORA = Code(
    "CFG016",
    Severity.ERROR,
    Text(
        "freeze together with LoRA",
        "freeze names {num_patterns} pattern(s), but lora is set.",
        "LoRA freezes the whole base model already; freeze chooses what a full fine-tune leaves alone.",
        (
            "For LoRA remove freeze, and choose modules by lora.target_modules.",
            "For a full fine-tune set `lora: null`.",
        ),
    ),
    Text(
        "freeze 与 LoRA 同时使用",
        "freeze 给出了 {num_patterns} 个模式，但同时设置了 lora。",
        "LoRA 本来就冻结整个基础模型；freeze 用于全量微调时选择不训练的部分。",
        ("用 LoRA 时删除 freeze，并用 lora.target_modules 选择模块。", "全量微调请设 `lora: null`。"),
    ),
)
SCALER_FLOOR = Code(
    "CFG020",
    Severity.ERROR,
    Text(
        "loss scale starts below its floor",
        "scaler.init_scale is {init_scale}, below scaler.min_scale {min_scale}.",
        "The scale may only move between the floor and infinity.",
        ("Raise scaler.init_scale (65536 is usual), or lower scaler.min_scale (0.0625 is usual).",),
    ),
    Text(
        "初始损失缩放低于下限",
        "scaler.init_scale 是 {init_scale}，低于 scaler.min_scale {min_scale}。",
        "缩放值只能在下限以上变动。",
        ("调高 scaler.init_scale（通常为 65536），或调低 scaler.min_scale（通常为 0.0625）。",),
    ),
)
UNUSED_SETTING = Code(
    "CFG021",
    Severity.NOTE,
    Text(
        "a setting has no effect",
        "{key} is {value}, which has no effect because {reason}.",
        "",
        ("Nothing needs to be done; remove {key} to keep the recipe tidy.",),
    ),
    Text(
        "有一项设置不起作用",
        "{key} 的值是 {value}，但不起作用，因为{reason}。",
        "",
        ("无需处理；删除 {key} 可让配方更清楚。",),
    ),
)
RANDOM_LORA = Code(
    "CFG022",
    Severity.WARNING,
    Text(
        "LoRA on a random model",
        "model.random_init is true and lora is set.",
        "LoRA adds a small correction to a trained model; on random weights there is nothing to correct.",
        ("Set `lora: null` to train all weights, or `model.random_init: false` to load the trained ones.",),
    ),
    Text(
        "在随机模型上使用 LoRA",
        "model.random_init 为 true，同时设置了 lora。",
        "LoRA 是对已训练模型的小修正；随机权重没有可修正的内容。",
        ("设 `lora: null` 训练全部权重，或设 `model.random_init: false` 载入已训练的权重。",),
    ),
)

CODES = (
    BOTH_HALVES,
    PRECISION_CONFLICT,
    PURE_FP16,
    SCHEDULE_TOO_LONG,
    FREEZE_WITH_LORA,
    SCALER_FLOOR,
    UNUSED_SETTING,
    RANDOM_LORA,
)
