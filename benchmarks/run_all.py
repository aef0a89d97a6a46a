"""All measurements, one after the other; tables on the screen, records under ``results/``.

python benchmarks/run_all.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "one_nan.py",
    "story.py",
    "cures.py",
    "guard_overhead.py",
    "speed.py",
    "memory.py",
    "start_up.py",
    "time_machine.py",
    "resume_peers.py",
)


def main() -> None:
    """Stop at the first script that fails."""
    for name in SCRIPTS:
        subprocess.run([sys.executable, str(Path(__file__).with_name(name))], check=True)


if __name__ == "__main__":
    main()
