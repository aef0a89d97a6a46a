"""Codes of precision: what may be asked for, what a device really computes, what it costs."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.numerics import codes_determinism

UNKNOWN_PRECISION = Code(
    "CFG200",
    Severity.ERROR,
    Text(
        "unknown precision",
        "There is no precision {requested}; there are {known}.",
        "The precision decides what the numbers of the whole run are, so no guess is made.",
        ("write precision: {suggestion}", "write precision: auto and let the device decide"),
    ),
    Text(
        "未知的精度",
        "没有名为 {requested} 的精度；可用的有 {known}。",
        "精度决定整个训练的数值，因此不做猜测。",
        ("写 precision: {suggestion}", "写 precision: auto，由设备决定"),
    ),
)

PURE_FP16 = Code(
    "CFG201",
    Severity.ERROR,
    Text(
        "trainable weights in fp16",
        "{requested} would keep trainable weights and Adam's moments in fp16; that is refused.",
        "Adam's eps 1e-8 is 0 in fp16 and second moments underflow to 0, so the first update is a division by zero: "
        "the weights are NaN or inf after one step, at any learning rate, while the loss of that step looks normal.",
        (
            "write precision: fp16 (fp32 weights, fp16 arithmetic, supervised loss scale)",
            "to save memory write precision: bf16-pure, or train LoRA",
        ),
    ),
    Text(
        "以 fp16 存放可训练权重",
        "{requested} 会把可训练权重和 Adam 的动量存成 fp16，已拒绝。",
        "Adam 的 eps 1e-8 在 fp16 中等于 0，二阶动量也会下溢为 0，第一次更新就是除以零："
        "无论学习率多大，一步之后权重即为 NaN 或 inf，而该步的损失看起来仍然正常。",
        (
            "写 precision: fp16（权重为 fp32，计算为 fp16，损失缩放受监督）",
            "想节省内存，写 precision: bf16-pure，或训练 LoRA",
        ),
    ),
)

DEVICE_CANNOT = Code(
    "CFG202",
    Severity.ERROR,
    Text(
        "the device cannot compute this precision",
        "{device} cannot multiply {dtype} matrices: {problem}",
        "A run that asked for {requested} would stop at its first layer, or be computed in something else.",
        ("write precision: auto", "write precision: fp32"),
    ),
    Text(
        "设备无法以此精度计算",
        "{device} 无法做 {dtype} 矩阵乘法：{problem}",
        "要求 {requested} 的训练会在第一层停止，或被换成别的精度计算。",
        ("写 precision: auto", "写 precision: fp32"),
    ),
)

EMULATION_NEEDS_CPU = Code(
    "CFG203",
    Severity.ERROR,
    Text(
        "emulated half on an accelerator",
        "{requested} runs on the CPU only; the device is {device}.",
        "Emulation stands in for half arithmetic where it is missing or slow; {device} has its own.",
        ("write precision: {native}", "run on the CPU to emulate: device: cpu"),
    ),
    Text(
        "在加速器上模拟半精度",
        "{requested} 只能在 CPU 上运行；当前设备是 {device}。",
        "模拟用于缺少半精度运算或运算很慢的设备；{device} 自带半精度运算。",
        ("写 precision: {native}", "要模拟，请在 CPU 上运行：device: cpu"),
    ),
)

SLOW_HALF = Code(
    "MOD100",
    Severity.WARNING,
    Text(
        "half arithmetic is slow on this device",
        "A {dtype} matrix product takes {ratio} times as long as an fp32 one on {device}.",
        "Without half-precision matrix units every product is converted piece by piece. The numbers are right.",
        (
            "write precision: {emulated}: the same rounding and the same overflows at about the price of fp32",
            "write precision: fp32 if half is not the point",
        ),
    ),
    Text(
        "此设备上的半精度运算很慢",
        "在 {device} 上，{dtype} 矩阵乘法的耗时是 fp32 的 {ratio} 倍。",
        "没有半精度矩阵单元时，每次乘法都要逐块转换。结果是正确的。",
        (
            "写 precision: {emulated}：舍入和溢出都相同，耗时与 fp32 相近",
            "若并不需要半精度，写 precision: fp32",
        ),
    ),
)

LOST_UPDATES = Code(
    "MOD101",
    Severity.WARNING,
    Text(
        "bf16 weights lose small updates",
        "{requested} keeps the weights in bf16, which has 8 significant bits.",
        "An update smaller than 2^-9 to 2^-8 of its weight is rounded away. With AdamW at a learning rate of 1e-5, "
        "0.5 % of the weights had moved after 100 steps; in fp32 all of them had. Nothing looks wrong meanwhile.",
        (
            "write precision: bf16 (fp32 weights, bf16 arithmetic)",
            "train LoRA: its own weights stay fp32",
            "watch for OPT001 (stalled update) in the report",
        ),
    ),
    Text(
        "bf16 权重会丢失小的更新",
        "{requested} 以 bf16 存放权重，有效位只有 8 位。",
        "小于权重 2^-9 到 2^-8 的更新会被舍掉。AdamW 学习率 1e-5 时，100 步后只有 0.5 % 的权重有变化，"
        "而 fp32 下全部有变化；期间看不出任何异常。",
        (
            "写 precision: bf16（权重为 fp32，计算为 bf16）",
            "训练 LoRA：其自身权重保持 fp32",
            "留意报告中的 OPT001（更新停滞）",
        ),
    ),
)

NOT_AS_REQUESTED = Code(
    "MOD102",
    Severity.ERROR,
    Text(
        "the device computes another precision than was asked for",
        "{requested} was asked for, but a probe on {device} computed {actual}: output {dtype}, 300 * 300 = {product}.",
        "A run in another precision than it claims proves nothing about that precision: no overflow that is seen "
        "here, or not seen, would mean anything.",
        ("write precision: auto", "update torch (this is {torch}), then try again"),
    ),
    Text(
        "设备实际计算的精度与要求不符",
        "要求 {requested}，但在 {device} 上的探测得到 {actual}：输出 {dtype}，300 * 300 = {product}。",
        "实际精度与声称不符的训练说明不了该精度的任何问题：这里出现或没有出现的溢出都没有意义。",
        ("写 precision: auto", "升级 torch（当前为 {torch}）后重试"),
    ),
)

WEIGHTS_NOT_AS_REQUESTED = Code(
    "MOD103",
    Severity.ERROR,
    Text(
        "trainable weights have the wrong dtype",
        "{count} trainable tensors are {dtype} under precision {requested}, first {first}; expected {expected}.",
        "fp16 cannot hold Adam's eps and moments (NaN after one step); bf16 weights lose small updates unseen.",
        ("load the model with this precision: it casts the trainable weights to {expected}",),
    ),
    Text(
        "可训练权重的类型不对",
        "精度 {requested} 下有 {count} 个可训练张量是 {dtype}，第一个是 {first}；应为 {expected}。",
        "fp16 存不下 Adam 的 eps 和动量（一步之后即为 NaN）；bf16 权重会不知不觉丢失小的更新。",
        ("以该精度加载模型：可训练权重会转为 {expected}",),
    ),
)

DEVICE_UNUSABLE = Code(
    "MOD104",
    Severity.ERROR,
    Text(
        "the device cannot be used",
        "The device {device} does not work here: {problem}",
        "Either torch was built without it, or the driver or the hardware is missing.",
        ("use device: auto, which takes an accelerator where there is one", "`finitune env` lists the devices found"),
    ),
    Text(
        "设备不可用",
        "设备 {device} 在这里不可用：{problem}",
        "torch 未包含对它的支持，或缺少驱动或硬件。",
        ("使用 device: auto，有加速器时会自动选用", "`finitune env` 会列出找到的设备"),
    ),
)

CODES = (
    DEVICE_UNUSABLE,
    UNKNOWN_PRECISION,
    PURE_FP16,
    DEVICE_CANNOT,
    EMULATION_NEEDS_CPU,
    SLOW_HALF,
    LOST_UPDATES,
    NOT_AS_REQUESTED,
    WEIGHTS_NOT_AS_REQUESTED,
    *codes_determinism.CODES,
)
