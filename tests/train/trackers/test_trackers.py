"""Trackers csv and tensorboard: what is logged is on the disk, NaN and inf included."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from finitune.core import registry
from finitune.train.trackers.csv import Tracker


def test_csv_keeps_every_value_exactly_and_appends(tmp_path: Path) -> None:
    for step, value in ((1, 0.1), (2, math.nan), (3, math.inf)):
        tracker = Tracker(tmp_path)
        tracker.log(step, {"train/loss": value})
        tracker.close()
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as handle:
        head, *rows = csv.reader(handle)
    assert head == ["step", "name", "value"]
    assert rows[0] == ["1", "train/loss", "0.1"]
    assert math.isnan(float(rows[1][2]))
    assert float(rows[2][2]) == math.inf


def test_csv_rows_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log(1, {"a": 1.0})
    assert "1,a,1.0" in (tmp_path / "metrics.csv").read_text()
    tracker.close()


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    tracker = registry.load("trackers", "tensorboard").Tracker(tmp_path)
    tracker.log(1, {"train/loss": math.nan})
    tracker.close()
    assert list((tmp_path / "tensorboard").glob("events*"))
