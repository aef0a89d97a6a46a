"""What is promised of a run's bits."""

TEXTS = {
    "determinism.exact": "bit for bit on this machine and build",
    "determinism.why_cpu": "deterministic kernels, random numbers by counter; {threads} CPU threads are part of it",
    "determinism.why_device": (
        "deterministic kernels of {device} where it has them (NUM111 names what has none), random numbers by counter; "
        "driver and libraries are part of it"
    ),
    "determinism.as_they_come": "not promised bit for bit",
    "determinism.why_off": "guard.deterministic=false: the fastest kernels; {threads} CPU threads",
}
