"""What a trial must have come to."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finitune.core.journal import read
from kill import damage
from kill.damage import Damage
from kill.oracle import Truth, differences, last_of, leftovers, unreadable

if TYPE_CHECKING:
    from kill.trials import Outcome

CHECKPOINT_PASSED_OVER = "SYS006"
JOURNAL_DAMAGED = "SYS041"
SAVE_FAILED = "SYS001"
SAVE_CODES = {SAVE_FAILED, "SYS002", "SYS010", "SYS015"}
JOURNAL_LOST = {SAVE_FAILED, "SYS010", "SYS040"}


def judge(outcome: Outcome, truth: Truth, run: Path) -> None:
    """After deaths and a failing disk: the same end, nothing torn, nothing left behind."""
    last, first, trial = outcome.replies[-1], outcome.replies[0], outcome.trial
    if last["status"] != "finished":
        outcome.faults.append(
            f"did not come to an end: {last['status']} {last.get('text') or last.get('halted') or ''}"
        )
        return
    found = differences(truth, run)
    if first["status"] == "finished" and first.get("findings", {}).get(SAVE_FAILED):
        # The run was over and its result saved: a last checkpoint that could not be written was told, and is no loss.
        found = [f for f in found if not f.startswith("last checkpoint")]
    outcome.faults += found
    if not any(set(f["operations"]) & {"remove", "rmdir"} for f in trial.faults):
        outcome.leftovers += leftovers(run)
    outcome.faults += _lived_through(outcome) if trial.faults or trial.file_limit or trial.disk else []
    if first["status"] == "interrupted":
        outcome.faults += _done_twice(run)


def judge_first_end(outcome: Outcome, truth: Truth, run: Path) -> None:
    """A run that calls itself finished while the disk still refuses has its result, and says what it lost."""
    reply = outcome.replies[-1]
    if reply["status"] != "finished":
        return
    if not (run / "final").is_dir():
        outcome.faults.append("it says that it has finished, and there is no result")
    journalled = last_of(list(read(run / "journal.jsonl")), "step", "step", "loss_scale")
    if truth.steps.keys() - journalled.keys() and not reply["findings"].keys() & JOURNAL_LOST:
        outcome.faults.append("it says that it has finished, and not that its journal is not whole")


def lacks_summary(outcome: Outcome, run: Path) -> bool:
    """The very last file of a run could not be written; when that is said, the next process may mend it."""
    reply = outcome.replies[-1]
    told = reply["status"] == "finished" and SAVE_FAILED in reply["findings"]
    return told and not (run / "summary.json").exists()


def _lived_through(outcome: Outcome) -> list[str]:
    """A run never dies of a disk that recovers, and never passes over in silence what it could not write."""
    trial, first = outcome.trial, outcome.replies[0]
    if first["died"] not in (0, signal.SIGKILL):
        return [f"the process died of signal {first['died']}"]
    touches_checkpoints = any("checkpoint" in f.get("match", "") for f in trial.faults)
    # A disk that refuses before anything has begun, or just when the result is to be saved, may end the process.
    may_end = trial.lasting or first["status"] == "refused" or not all(_in_training(f) for f in trial.faults)
    if not may_end and first["status"] != "finished":
        return [f"{first['status']} because of a disk that was at fault for a while: {first}"]
    reads = any("read" in f["operations"] for f in trial.faults)
    if reads and first.get("hits") and CHECKPOINT_PASSED_OVER not in first.get("findings", {}):
        return ["a checkpoint that cannot be read was not passed over by name"]
    told = first.get("findings", {}).keys() & SAVE_CODES
    writes = any(set(f["operations"]) & {"open", "write", "fsync", "rename", "mkdir", "rust"} for f in trial.faults)
    refused = any(f["error"] != "SHORT" for f in trial.faults)
    if first.get("hits") and touches_checkpoints and writes and refused and not told:
        return ["a save failed and nothing was said"]
    return []


def _in_training(fault: Mapping[str, Any]) -> bool:
    """Whether what fails is written in the middle of a run only."""
    return any(name in fault["match"] for name in ("checkpoint", "trusted", "journal"))


def _done_twice(run: Path) -> list[str]:
    """After an orderly stop no transaction is done again."""
    attempts = [r["attempt"] for r in read(run / "journal.jsonl") if r["kind"] == "step"]
    return [f"attempt {a} was made twice" for a in sorted(set(attempts)) if attempts.count(a) > 1]


def judge_refusal(outcome: Outcome, what: Damage, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """A resume that is refused changes nothing (but may sweep); only some damages may lead to one."""
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name) and not name.startswith(".")}
    if changed:
        outcome.faults.append(f"a refused resume changed the folder: {sorted(changed)}")
    text = outcome.replies[-1]["text"]
    # A checkpoint that agrees with its manifest and is none was made on purpose: naming it is enough.
    forged = what.kind.startswith("forge") and "checkpoint-9" in text
    if not (forged or what.in_recipe or (what.in_journal and what.kind == "folder")):
        outcome.faults.append(f"the run was not resumed: {text}")


def judge_damage(outcome: Outcome, what: Damage, truth: Truth, run: Path) -> None:
    """The damage was named, and the run went on from what is good."""
    reply = outcome.replies[-1]
    if reply["status"] != "finished":
        outcome.faults.append(f"did not come to an end: {reply['status']} {reply.get('text', '')}")
        return
    outcome.faults += differences(truth, run, journal_whole=not what.in_journal)
    outcome.leftovers += leftovers(run)
    outcome.unreadable += unreadable(run)
    if what.in_checkpoint:
        said = [str(r) for r in read(run / "journal.jsonl") if r.get("code") == CHECKPOINT_PASSED_OVER]
        names = ("checkpoint-9", "checkpoint-6") if what.file == "folders" else (Path(what.file).name,)
        if CHECKPOINT_PASSED_OVER not in reply["findings"]:
            outcome.faults.append("a damaged checkpoint was not found out")
        elif not all(any(name in text for text in said) for name in names):
            outcome.faults.append(f"the damaged file is not named: {said}")
    if what.in_journal and what.kind in damage.SEEN_IN_JOURNAL and JOURNAL_DAMAGED not in reply["findings"]:
        outcome.faults.append("the damage of the journal was not said")
    if damage.was_unpickled(run):
        outcome.faults.append("a pickle was executed")
