"""Damaged files are found out and named, and the run goes on from the checkpoint before."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from kill import plans

if TYPE_CHECKING:
    from kill.client import Pool
    from kill.conftest import Benches, Run


def test_damage_is_named_and_the_run_goes_on_from_what_is_good(benches: Benches, pool: Pool, run: Run) -> None:
    made = benches.of(plans.DAMAGED)
    run(chain.from_iterable(plans.damages(bench, pool.servers[0]) for bench in made))
