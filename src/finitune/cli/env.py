"""``finitune env``: the machine, as far as it matters for training; for bug reports."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import typer

from finitune.cli.render import Table
from finitune.cli.session import Outcome
from finitune.cli.version import versions

# Instruction sets that decide how fast a half format is on a CPU.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "f16c", "bf16", "fphp")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("env", help="cli.env.help")(env)


def env() -> Outcome:
    """Versions, processor, memory, devices."""
    facts = {**versions(), **_machine(), **_torch_facts()}
    rows = tuple((name, _shown(value)) for name, value in facts.items())
    return Outcome((Table(rows),), {"env": facts})


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _machine() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpu_flags": cpu_flags(),
        "logical_cpus": os.cpu_count(),
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def cpu_flags(source: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The half-format instruction sets that Linux reports; empty elsewhere."""
    try:
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    line = next((item for item in lines if item.lower().startswith(("flags", "features"))), "")
    present = set(line.partition(":")[2].split())
    return [flag for flag in _CPU_FLAGS if flag in present]


def _torch_facts() -> dict[str, Any]:
    """What torch sees. A broken installation is reported, not raised: this command is for finding it."""
    try:
        import torch

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        count = torch.accelerator.device_count() if accelerator else 0
        return {
            "torch_threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "accelerator": str(accelerator) if accelerator else None,
            "accelerator_count": count,
            "cuda": torch.version.cuda,
            "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        }
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return {"torch_error": f"{type(error).__name__}: {error}"}
