"""Fork servers and benches, made once; the report at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from kill import plans, report
from kill.bench import Bench, set_up
from kill.client import Pool
from kill.configurations import CONFIGURATIONS
from kill.trials import Outcome, Trial, run_trial

_FULL_TIMEOUT_S = 4 * 3600
_SLICE_TIMEOUT_S = 240
_SHOWN = 12
_STARTED_S = time.monotonic()

Run = Callable[[Iterable[Trial]], list[Outcome]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of it is the marker's; without fork nothing of it can be done."""
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.kill)
        item.add_marker(pytest.mark.timeout(_FULL_TIMEOUT_S if plans.FULL else _SLICE_TIMEOUT_S))
        if sys.platform != "linux":
            item.add_marker(pytest.mark.skip(reason="forking a process that has torch in it is safe on Linux only"))


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Fork servers, warm."""
    jobs = int(os.environ.get("FINITUNE_KILL_JOBS", min(2, os.cpu_count() or 1)))
    made = Pool(tmp_path_factory.mktemp("kill"), jobs)
    try:
        made.warm_up("LoRA bf16 packed")
        yield made
    finally:
        made.close()


class Benches:
    """The bench of every configuration, made when it is first asked for."""

    def __init__(self, pool: Pool, home: Path) -> None:
        self.pool, self.home = pool, home
        self.made: dict[str, Bench] = {}

    def of(self, names: Iterable[str]) -> list[Bench]:
        """Benches by the names of configurations."""
        wanted = list(names)
        new = [name for name in wanted if name not in self.made]
        homes = {name: self.home / f"bench-{list(CONFIGURATIONS).index(name)}" for name in new}
        checked = set(new) if plans.FULL else {next(iter(CONFIGURATIONS))}
        made = self.pool.map(
            lambda server, name: set_up(server, name, homes[name], check_the_watch=name in checked), new
        )
        self.made.update(zip(new, made, strict=True))
        return [self.made[name] for name in wanted]


@pytest.fixture(scope="session")
def benches(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Benches:
    return Benches(pool, tmp_path_factory.mktemp("benches"))


@pytest.fixture
def run(pool: Pool, benches: Benches, tmp_path: Path) -> Run:
    """Run trials; fails with what is needed to see and to repeat each that came out wrong."""

    def run_all(trials: Iterable[Trial]) -> list[Outcome]:
        numbered = list(enumerate(plans.thinned(trials)))
        known = {b.configuration: b for b in benches.of({t.configuration for _, t in numbered})}
        outcomes = pool.map(
            lambda server, item: run_trial(server, item[1], known[item[1].configuration], tmp_path / str(item[0])),
            numbered,
        )
        report.OUTCOMES.extend(outcomes)
        bad = [outcome for outcome in outcomes if not outcome.good]
        text = "\n\n".join(outcome.report() for outcome in bad[:_SHOWN])
        assert not bad, f"{len(bad)} of {len(outcomes)} trials came out wrong:\n\n{text}\n\nfolders: {tmp_path}"
        return outcomes

    return run_all


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of the whole matrix, and the file that keeps it."""
    kept = os.environ.get("FINITUNE_KILL_REPORT")
    if not report.OUTCOMES or not (plans.FULL or kept):
        return
    time_s = time.monotonic() - _STARTED_S
    terminalreporter.write_line(report.as_markdown(time_s))
    if kept:
        report.keep(Path(kept), time_s)
