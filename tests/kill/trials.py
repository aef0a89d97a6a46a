"""One trial: a run that dies, or whose disk or files are at fault, and that has to come to the same end."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kill import damage, machine, verdict
from kill.bench import Bench
from kill.client import Server
from kill.oracle import digests, unreadable

_MAX_RESUMES = 4
# The run folder does not say yet what run it is: it has to be begun anew.
_NOTHING_TO_RESUME = "SYS005"


@dataclass(frozen=True)
class Trial:
    """What is done to a run. Every part is plain text, so that a failure can be printed and done again."""

    configuration: str
    kind: str
    """Row of the report."""
    deaths: tuple[str, ...] = ()
    """One process after the other: ``at PLACE``, or ``signal NUMBER after SECONDS, ...``."""
    template: str = ""
    """Begin with a copy of a run that has died: ``early``, at its eighth step, or ``late``, committing its last
    checkpoint.
    """
    faults: tuple[Mapping[str, Any], ...] = ()
    """How the disk fails in the first process."""
    file_limit: Mapping[str, Any] | None = None
    """How large files may become in the first process."""
    trace: str = ""
    """What strace does to the system calls of the first process."""
    disk: str = ""
    """Size of the disk that the run is on; there is room once the first process has ended."""
    damage: str = ""
    """What is done to the files of the template; see damage.py."""

    @property
    def lasting(self) -> bool:
        """The disk recovers only when the first process has ended."""
        return (
            bool(self.disk)
            or any(f.get("count") is None for f in self.faults)
            or (self.file_limit is not None and self.file_limit.get("until_step") is None)
        )

    def how_to_repeat(self) -> str:
        """The command that runs this trial alone."""
        text = json.dumps({k: v for k, v in asdict(self).items() if v})
        return f"FINITUNE_KILL_TRIAL={shlex.quote(text)} python -m pytest tests/kill -k one_trial"

    @classmethod
    def parse(cls, text: str) -> Trial:
        """From the text that :meth:`how_to_repeat` prints."""
        record = json.loads(text)
        for name in ("deaths", "faults"):
            record[name] = tuple(record.get(name, ()))
        return cls(**record)


@dataclass
class Outcome:
    """What came of a trial."""

    trial: Trial
    faults: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    missed: int = 0
    """Places that the process never came to (it finished instead)."""
    replies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.faults or self.unreadable or self.leftovers)

    def report(self) -> str:
        """All that is needed to see what is wrong, and to do it again."""
        lines = [f"{self.trial.configuration}: {self.trial.kind}", f"  {self.trial.how_to_repeat()}"]
        lines += [f"  at fault: {fault[:1500]}" for fault in self.faults[:4]]
        lines += [f"  unreadable: {fault}" for fault in self.unreadable[:4]]
        lines += [f"  left behind: {name}" for name in self.leftovers[:4]]
        lines += [f"  process {n}: {_short(reply)}" for n, reply in enumerate(self.replies, 1)]
        return "\n".join(lines)


def _short(reply: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in reply.items() if k not in ("points", "time_s", "text") and v not in (None, 0)}


def run_trial(server: Server, trial: Trial, bench: Bench, home: Path) -> Outcome:
    """Do a trial in ``home``, which is not there yet; the folder of a good one is removed."""
    outcome = Outcome(trial)
    if trial.template:
        shutil.copytree(bench.template(server, trial.template), home, symlinks=True)
    else:
        home.mkdir(parents=True)
    if trial.damage:
        _damaged(server, trial, bench, home, outcome)
    else:
        with machine.small_disk(home, trial.disk) if trial.disk else contextlib.nullcontext():
            _processes(server, trial, bench, home, outcome)
            verdict.judge(outcome, bench.truth, home / "run")
    if outcome.good:
        shutil.rmtree(home)
    return outcome


def _processes(server: Server, trial: Trial, bench: Bench, home: Path, outcome: Outcome) -> None:
    """The deaths one after the other, and then resumes until the run is finished."""
    requests = [_request(death) for death in trial.deaths] or [{}]
    requests[0] |= {"faults": list(trial.faults), "file_limit": trial.file_limit}
    requests[0] |= {"trace": ["-e", trial.trace]} if trial.trace else {}
    for number, request in enumerate([*requests, *[{}] * _MAX_RESUMES]):
        resume = bool(trial.template) or number > 0
        reply = go_on(server, trial, home, outcome, resume=resume, **request)
        server = server.next
        if trial.disk and number == 0:
            machine.make_room(home)
        outcome.missed += "death" in request and not reply["died"] and reply["status"] == "finished"
        lasting = number == 0 and (trial.lasting or verdict.lacks_summary(outcome, home / "run"))
        if lasting:
            verdict.judge_first_end(outcome, bench.truth, home / "run")
        if reply["status"] in ("traceback", "hung") or (reply["status"] == "finished" and not lasting):
            break


def go_on(
    server: Server, trial: Trial, home: Path, outcome: Outcome, *, resume: bool, **request: Any
) -> dict[str, Any]:
    """One process: start, or resume what is there, or begin anew what had not yet begun to be a run."""
    request = {"configuration": trial.configuration, "home": str(home)} | request
    reply = server.ask("train", resume=resume, **request)
    outcome.replies.append(reply)
    if resume and reply["status"] == "refused" and reply["codes"] == [_NOTHING_TO_RESUME] and not trial.damage:
        if (home / "run" / "recipe.yaml").exists():
            outcome.faults.append(f"a run with a recipe was not resumed: {reply['text']}")
        reply = server.ask("train", resume=False, **request)
        outcome.replies.append(reply)
    if reply["status"] in ("traceback", "hung"):
        outcome.faults.append(f"{reply['status']}: {reply.get('text', '')[-1500:]}")
    found = unreadable(home / "run") if not trial.damage else []
    outcome.unreadable += [f"after process {len(outcome.replies)}: {fault}" for fault in found]
    return reply


def _damaged(server: Server, trial: Trial, bench: Bench, home: Path, outcome: Outcome) -> None:
    """A resume of damaged files, and one with the recipe given anew where the stored one is not usable."""
    what, run = damage.Damage.parse(trial.damage), home / "run"
    damage.apply(what, run)
    before = digests(run)
    reply = go_on(server, trial, home, outcome, resume=True)
    if reply["status"] == "refused":
        verdict.judge_refusal(outcome, what, before, digests(run))
        if not what.in_recipe:
            return
        reply = go_on(server, trial, home, outcome, resume=True, with_recipe=True)
    verdict.judge_damage(outcome, what, bench.truth, run)


def _request(death: str) -> dict[str, Any]:
    """How a process is to end: ``at PLACE``, ``signal NUMBER after SECONDS``."""
    if death.startswith("at "):
        return {"death": death[3:]}
    signals = []
    for part in filter(None, death.split(", ")):
        _, number, _, after_s = part.split(" ")
        signals.append((float(after_s), int(number)))
    return {"signals": signals}
