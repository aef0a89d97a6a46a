"""What a guard needs more on several ranks: its port, its folder, and snapshots at the same steps everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from finitune.adapters.bare import BarePort
from finitune.adapters.bare_asked import Loop, LossFn
from finitune.adapters.bare_held import HeldBatches
from finitune.adapters.ranks import Ranks, ranks_of
from finitune.adapters.ranks_port import RanksPort
from finitune.engine.monitor import Monitor
from finitune.engine.snapshot import SnapshotRing


def calling(model: Any, loss_fn: LossFn) -> LossFn:
    """``loss_fn`` that is given the model as the script calls it, whichever the guard works with."""
    return (lambda _inner, batch: loss_fn(model, batch)) if _is_wrapped(model) else loss_fn


def _is_wrapped(model: Any) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks of a script, and the model as it calls it."""

    ranks: Ranks
    called: nn.Module

    @classmethod
    def of(cls, model: nn.Module, wanted: Any) -> Team | None:
        """None for one process; see :func:`finitune.adapters.ranks.ranks_of`."""
        ranks = ranks_of(model, wanted)
        return None if ranks is None else cls(ranks, model)

    def port(self, loop: Loop, held: HeldBatches, monitor: Monitor | None) -> RanksPort:
        """The port of this rank."""
        return RanksPort(loop, held, monitor, self.ranks, self.called)

    def folder(self, run_dir: str | Path | None) -> Path | None:
        """Of this rank's records: no two processes write one journal."""
        if run_dir is None:
            return None
        return Path(run_dir) if self.ranks.rank == 0 else Path(run_dir) / f"rank_{self.ranks.rank}"


class Pace:
    """Keeps the snapshots of all ranks at the same steps: the distance is rank 0's, their number the least of all."""

    def __init__(self, port: BarePort, ring: SnapshotRing) -> None:
        """A collective."""
        assert isinstance(port, RanksPort)
        self.port, self.ring = port, ring
        self.agree()

    def keep(self) -> None:
        """Before it is asked whether a snapshot is due."""
        self.ring.distance.steps = self.port.pace

    def agree(self) -> None:
        """A collective: as many places as the rank with the least memory has."""
        self.ring.num_slots = int(min(row[0] for row in self.port.ranks.gather([float(self.ring.num_slots)])))
        self.ring.taken = self.ring.taken[max(0, len(self.ring.taken) - self.ring.num_slots) :]

    def taken(self) -> None:
        """After a snapshot: what it cost is told with the next step."""
        self.port.pace = self.ring.distance.steps
