"""What is promised of a run's bits."""

TEXTS = {
    "determinism.exact": "在本机和本构建上逐比特一致",
    "determinism.why_cpu": "确定性内核，随机数由计数器决定；{threads} 个 CPU 线程也是条件之一",
    "determinism.why_device": (
        "{device} 有确定性内核之处均使用（没有的由 NUM111 指出），随机数由计数器决定；驱动和库也是条件之一"
    ),
    "determinism.as_they_come": "不保证逐比特一致",
    "determinism.why_off": "guard.deterministic=false：使用最快的内核；{threads} 个 CPU 线程",
}
