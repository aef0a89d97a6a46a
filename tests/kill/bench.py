"""What the trials of one configuration share: the truth, the places, runs that have died."""

from __future__ import annotations

import shutil
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill.client import Server
from kill.configurations import STEPS
from kill.oracle import Truth, differences
from kill.points import Place

_DEATHS = {
    "early": "step before forward_backward#8",
    "late": f"rename .checkpoint-{STEPS}.*-*.tmp to checkpoint-{STEPS}#1",
}
"""Where the runs died that trials begin with a copy of."""


@dataclass
class Bench:
    """What is known of a configuration."""

    configuration: str
    home: Path
    truth: Truth
    places: list[Place]
    """Of an uninterrupted run."""
    length_s: float
    """Time of an uninterrupted run."""
    resume_places: list[Place] = field(default_factory=list)
    """Of the resume of the run that died early."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def template(self, server: Server, name: str) -> Path:
        """A run that has died, to be copied; made when it is first asked for."""
        home = self.home / name
        with self._lock:
            if not home.exists():
                home.mkdir()
                reply = server.ask("train", configuration=self.configuration, home=str(home), death=_DEATHS[name])
                assert reply["died"] == signal.SIGKILL, reply
        return home


def set_up(server: Server, configuration: str, home: Path, *, check_the_watch: bool) -> Bench:
    """Run a configuration without interruption, and look at a resume of it.

    ``check_the_watch``: prove that a run is the same when nobody watches it.
    """
    watched = _finished(server, configuration, home / "watched", watch=True)
    truth = Truth.of(home / "watched" / "run")
    bench = Bench(configuration, home, truth, _places(watched), watched["time_s"])
    if check_the_watch:
        plain = _finished(server.next, configuration, home / "plain")
        disturbed = differences(truth, home / "plain" / "run")
        assert not disturbed, f"a watched run differs from a plain one: {disturbed[:3]}"
        bench.length_s = plain["time_s"]
    shutil.copytree(bench.template(server, "early"), home / "again", symlinks=True)
    bench.resume_places = _places(_finished(server.next, configuration, home / "again", watch=True, resume=True))
    return bench


def _finished(server: Server, configuration: str, home: Path, **request: Any) -> dict[str, Any]:
    home.mkdir(parents=True, exist_ok=True)
    reply = server.ask("train", configuration=configuration, home=str(home), **request)
    assert reply["status"] == "finished", reply
    return reply


def _places(reply: dict[str, Any]) -> list[Place]:
    return [Place.parse(place) for place in reply["points"]]
