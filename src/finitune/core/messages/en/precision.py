"""Why a precision was chosen."""

TEXTS = {
    "precision.requested": "{name}: asked for",
    "precision.bf16.cuda": "bf16: {device} computes it natively",
    "precision.bf16.cpu": "bf16: this CPU has bf16 matrix units, and a product takes {ratio} times as long as in fp32",
    "precision.bf16.device": "bf16: {device} says that it computes it",
    "precision.fp16.device": "fp16 with a supervised loss scale: {device} does not compute bf16 natively",
    "precision.fp32.no_units": "fp32: this CPU has neither AMX-BF16 nor AVX512-BF16, so bf16 would be slower",
    "precision.fp32.slow_units": "fp32: this CPU has bf16 units, but a product takes {ratio} times as long as in fp32",
    "precision.fp32.unproved": "fp32: nothing proves that bf16 is fast on {device}; write precision: bf16 to try it",
}
