"""The command line starts fast: no torch, no transformers, no numpy for what does not compute.

Absence of a module is exact; wall time is noisy, so its ceiling is generous and the best of several
tries counts.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "peft", "numpy", "pandas", "pyarrow")
CEILING_S = 0.3
TRIES = 7

CODES = "from finitune.core.codes import all_codes; assert all_codes()"
DETECTORS = "from finitune.core import registry; [registry.load('detectors', n) for n in registry.names('detectors')]"


def command(*arguments: str) -> str:
    """A program that runs the command line as a shell would, whatever its exit code."""
    return f"import sys; sys.argv = ['finitune', *{list(arguments)!r}]; from finitune.cli.main import main; main()"


RUNS = """
import json, os, tempfile
home = tempfile.TemporaryDirectory()
run = os.path.join(home.name, "run")
os.makedirs(os.path.join(run, "checkpoint-1"))
with open(os.path.join(run, "journal.jsonl"), "w") as handle:
    for record in ({"kind": "start", "total_steps": 2}, {"kind": "step", "step": 1, "findings": [{"code": "NUM001"}]}):
        handle.write(json.dumps(record) + "\\n")
"""


def runs(*arguments: str) -> str:
    """A program that makes a run and shows it, or the folder it is in."""
    return RUNS + command("runs", "RUN", *arguments).replace("'RUN'", "run")


LIGHT = {
    "all codes": CODES,
    "all detectors": DETECTORS,
    "finitune": "import finitune; finitune.__version__",
    "finitune --help": command("--help"),
    "finitune explain CODE": command("explain", "NUM001"),
    "finitune explain": command("explain"),
    "finitune runs RUN": runs(),
    "finitune runs RUN --verify --json": runs("--verify", "--json"),
    "finitune runs DIR": RUNS + command("runs", "DIR").replace("'DIR'", "home.name"),
}


def loaded(program: str) -> set[str]:
    """Which heavy modules a fresh interpreter holds when ``program`` has run."""
    wrapped = (
        "import atexit, json, sys\n"
        f"atexit.register(lambda: sys.stderr.write('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules])))\n"
        f"{program}\n"
    )
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return set(json.loads(done.stderr.rsplit("\n", 1)[1]))


def best_time_s(program: str) -> float:
    """Wall time of a fresh interpreter that runs ``program``: start-up and all, the best of several tries."""
    return min(_once_s(program) for _ in range(TRIES))


def _once_s(program: str) -> float:
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    return time.perf_counter() - start_s


@pytest.mark.parametrize("name", LIGHT)
def test_nothing_heavy_is_loaded(name: str) -> None:
    assert loaded(LIGHT[name]) == set()


@pytest.mark.parametrize("name", ["all codes", "finitune --help", "finitune explain CODE"])
def test_it_is_fast(name: str) -> None:
    assert best_time_s(LIGHT[name]) <= CEILING_S


def test_the_light_programs_do_their_work() -> None:
    """A command line that died at once would be light, too."""
    done = subprocess.run([sys.executable, "-c", LIGHT["finitune explain CODE"]], capture_output=True, text=True)
    assert done.returncode == 0
    assert "NUM001" in done.stdout
    done = subprocess.run([sys.executable, "-c", LIGHT["finitune runs RUN"]], capture_output=True, text=True)
    assert "NUM001" in done.stdout, done.stderr


# ---- the meta-tests ----


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_a_heavy_import_is_seen(name: str) -> None:
    assert name in loaded(f"import {name}")


def test_a_heavy_import_inside_a_function_is_seen() -> None:
    assert "numpy" in loaded("def f():\n    import numpy\nf()")


def test_a_heavy_import_before_an_exit_is_seen() -> None:
    assert "numpy" in loaded("import numpy, sys; sys.exit(2)")


def test_a_program_that_fails_is_no_light_program() -> None:
    with pytest.raises(AssertionError, match="no_such_module"):
        loaded("import no_such_module")


def test_a_slow_program_is_slow() -> None:
    assert _once_s(f"import time; time.sleep({CEILING_S})") > CEILING_S


def test_the_heavy_modules_exist_here() -> None:
    """Otherwise their absence would prove nothing."""
    assert all(importlib.util.find_spec(m) for m in ("torch", "transformers", "peft", "numpy"))
