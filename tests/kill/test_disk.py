"""A run lives through a disk that is full, read-only or broken for a while, and never leaves anything torn."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kill import machine, plans
from kill.bench import Bench
from kill.client import Server
from kill.configurations import CONFIGURATIONS

if TYPE_CHECKING:
    from kill.client import Pool
    from kill.conftest import Benches, Run

_FEW = tuple(CONFIGURATIONS) if plans.FULL else ("full fp32", "LoRA fp32, 2 micro-batches")


@pytest.mark.parametrize("plan", [plans.disk_faults, plans.size_limits, plans.unreadable_files])
def test_a_run_lives_through_a_failing_disk(benches: Benches, run: Run, plan) -> None:
    outcomes = run(chain.from_iterable(plan(bench) for bench in benches.of(CONFIGURATIONS)))
    if plan is not plans.size_limits:
        assert any(reply.get("hits") for o in outcomes for reply in o.replies), "no fault ever struck"


def test_a_run_lives_through_a_small_disk(benches: Benches, run: Run, tmp_path: Path) -> None:
    reason = machine.why_no_small_disk(tmp_path.parent)
    if reason:
        pytest.skip(reason)
    run(chain.from_iterable(plans.small_disks(bench) for bench in benches.of(_FEW)))


def test_a_run_lives_through_what_a_tracer_does_to_its_system_calls(benches: Benches, pool: Pool, run: Run) -> None:
    reason = machine.why_no_tracer()
    if reason:
        pytest.skip(reason)
    made = benches.of(_FEW)
    outcomes = run(chain.from_iterable(plans.system_calls(b, _calls(pool.servers[0], b)) for b in made))
    assert any(o.replies[0]["died"] for o in outcomes), "the tracer never killed"


def _calls(server: Server, bench: Bench) -> dict[str, int]:
    """How often an uninterrupted run makes each system call."""
    home, log = bench.home / "traced", bench.home / "calls.txt"
    home.mkdir()
    watched = ["-e", f"trace={','.join(machine.CALLS)}", "-o", str(log)]
    reply = server.ask("train", configuration=bench.configuration, home=str(home), trace=watched)
    assert reply["status"] == "finished", reply
    names = [line.split("(", 1)[0].split()[-1] for line in log.read_text(errors="replace").splitlines() if "(" in line]
    return {name: names.count(name) for name in machine.CALLS}
