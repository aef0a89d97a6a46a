"""Why a precision was chosen."""

TEXTS = {
    "precision.requested": "{name}：按要求",
    "precision.bf16.cuda": "bf16：{device} 原生支持",
    "precision.bf16.cpu": "bf16：此 CPU 有 bf16 矩阵单元，矩阵乘法耗时为 fp32 的 {ratio} 倍",
    "precision.bf16.device": "bf16：{device} 报告支持该精度",
    "precision.fp16.device": "fp16（损失缩放受监督）：{device} 不原生支持 bf16",
    "precision.fp32.no_units": "fp32：此 CPU 既无 AMX-BF16 也无 AVX512-BF16，用 bf16 只会更慢",
    "precision.fp32.slow_units": "fp32：此 CPU 有 bf16 矩阵单元，但矩阵乘法耗时为 fp32 的 {ratio} 倍",
    "precision.fp32.unproved": "fp32：无法证明 {device} 上 bf16 足够快；可写 precision: bf16 自行尝试",
}
