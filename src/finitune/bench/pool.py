"""Cases side by side: worker processes with one thread each, a time limit a case, and no case lost to a crash."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from finitune.bench.cases import Case

MAX_CASE_S = 300
_CASES_A_WORKER = 40
"""Libraries that are loaded for one contender leave traces: workers are made anew now and then."""


def run_all(cases: Sequence[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """Records in the order in which cases end. A case that breaks the bench is a record with "defect"."""
    waiting, running = list(reversed(cases)), dict[Future[dict[str, Any]], Case]()
    pool = _pool(jobs)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop()
                running[pool.submit(guarded_case, case)] = case
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = [f for f in done if isinstance(f.exception(), BrokenProcessPool)]
            if broken:
                yield from _after_crash(running)
                running.clear()
                pool.shutdown(wait=False, cancel_futures=True)
                pool = _pool(jobs)
                continue
            for future in done:
                running.pop(future)
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(jobs: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, _start_worker, max_tasks_per_child=_CASES_A_WORKER)


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)


def _after_crash(running: dict[Future[dict[str, Any]], Case]) -> Iterator[dict[str, Any]]:
    """A worker died: which case killed it is not known, so each is run once more in a process of its own."""
    for case in running.values():
        with _pool(1) as alone:
            try:
                yield alone.submit(guarded_case, case).result()
            except BrokenProcessPool:
                yield {**_bare(case), "defect": "the process died"}


def guarded_case(case: Case, limit_s: int = MAX_CASE_S) -> dict[str, Any]:
    """One case within a time limit, whatever it does; must run in a process's main thread."""
    from finitune.bench.harness import run_case

    was = signal.signal(signal.SIGALRM, _too_long) if hasattr(signal, "SIGALRM") else None
    try:
        if was is not None:
            signal.alarm(limit_s)
        return run_case(case)
    except Exception as error:  # noqa: BLE001 (a defect of the bench is a record as well)
        return {
            **_bare(case),
            "defect": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(limit=-4),
        }
    finally:
        if was is not None:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, was)


def _last_lines() -> str:
    return traceback.format_exc(limit=-4)


def _too_long(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"more than {MAX_CASE_S} s")


def _bare(case: Case) -> dict[str, Any]:
    return {
        "key": case.key,
        "kind": case.kind,
        "name": case.name,
        "seed": case.seed,
        "contender": case.contender,
    }
