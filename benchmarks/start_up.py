"""Start-up of the command line: wall time of whole processes, least and median of several.

python benchmarks/start_up.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import report, timed

COMMANDS = (["--help"], ["explain", "NUM001"], ["version"], ["recipes", "list"])
TRIES = 7


def main() -> None:
    """The table."""
    program = Path(sys.executable).with_name("finitune")
    rows = []
    for words in COMMANDS:
        times = [
            timed(lambda w=words: subprocess.run([program, *w], stdout=subprocess.DEVNULL, check=True, env=os.environ))
            for _ in range(TRIES)
        ]
        rows.append(
            {"command": "finitune " + " ".join(words), "least s": min(times), "median s": statistics.median(times)}
        )
    report("start_up", rows)


if __name__ == "__main__":
    main()
