"""Run folders as they are read: every state, any damage, and while somebody writes or deletes them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finitune.core.files import write_manifest
from finitune.core.journal import Journal
from finitune.core.journal import read as read_journal
from finitune.train import checkpoint, keeper, resume, run_ends, run_page, runs
from finitune.train.lock import hold
from finitune.train.run import open_run, train_run
from finitune.train.run_ends import ends_of, integer, real, used_up
from finitune.train.run_page import page_of
from finitune.train.runs import State, faults_of, is_run, listed, look, size_of
from support.faults import at_step, poison_output
from support.runs import tiny_recipe

FIXTURE = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def write(run_dir: Path, *records: tuple[str, dict], recipe: str | None = "max_steps: 20\n") -> Path:
    """A run folder with these journal records."""
    run_dir.mkdir(parents=True, exist_ok=True)
    journal = Journal(run_dir / "journal.jsonl")
    for kind, record in records:
        journal.write(kind, **record)
    journal.close()
    if recipe is not None:
        (run_dir / "recipe.yaml").write_text(recipe)
    return run_dir


def start(total: int = 20, kind: str = "start", step: int = 0) -> tuple[str, dict]:
    return kind, {"step": step, "total_steps": total, "derived": {"model": "tiny"}, "device": "cpu"}


def step(number: int, loss: float = 2.0, action: str = "proceed", **more) -> tuple[str, dict]:
    return "step", {"step": number, "loss": loss, "action": action, "time_s": 0.5, "findings": [], **more}


def evaluated(number: int, loss: float) -> tuple[str, dict]:
    return "eval", {"step": number, "loss": loss}


def end(status: str = "finished", steps: int = 20, halted: str | None = None) -> tuple[str, dict]:
    return "end", {"status": status, "steps": steps, "halted": halted}


def add_checkpoint(run_dir: Path, number: int, *, trusted: bool = False) -> Path:
    folder = run_dir / f"checkpoint-{number}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    (folder / "optimizer.safetensors").write_bytes(b"m" * 500)
    write_manifest(folder, {"step": number})
    if trusted:
        checkpoint.trust(folder, number + 4)
    return folder


# ---- states ----


STATES = [
    ([start(), step(1), end()], State.FINISHED),
    ([start(), step(1), end("interrupted", 1)], State.INTERRUPTED),
    ([start(), step(1), end("halted", 1, "NUM100 too many")], State.HALTED),
    ([start(), step(1)], State.KILLED),
    ([start()], State.KILLED),
    ([start(), step(1), end(), start(30, "resume", 1)], State.KILLED),
    ([start(), step(1), end(), start(30, "resume", 1), step(2), end("interrupted", 2)], State.INTERRUPTED),
    ([], State.NOT_STARTED),
    ([start(), end("weather")], State.UNREADABLE),
]


@pytest.mark.parametrize(("records", "state"), STATES)
def test_the_last_session_decides_on_the_state(tmp_path, records, state):
    assert look(write(tmp_path / "run", *records)).state is state


def test_whoever_holds_the_lock_is_running_whatever_the_journal_says(tmp_path):
    run_dir = write(tmp_path / "run", start(), step(3), end())
    give_back = hold(run_dir)
    run = look(run_dir)
    assert (run.state, run.holder["pid"]) == (State.RUNNING, os.getpid())
    assert not run.can_go_on
    give_back()
    assert look(run_dir).state is State.FINISHED
    assert look(run_dir).holder == {}


def test_a_run_without_a_journal_has_not_started_and_can_begin(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1\nmax_steps: 7\n")
    run = look(tmp_path)
    assert (run.state, run.step, run.total_steps, run.can_go_on) == (State.NOT_STARTED, None, 7, True)


@pytest.mark.parametrize("content", [b"\xff" * 5000, b"\n" * 10, b"{}\n[]\nnull\n", b"x" * 3_000_000, b"[" * 100_000])
def test_a_journal_of_anything_else_is_damaged(tmp_path, content):
    (tmp_path / "journal.jsonl").write_bytes(content)
    assert look(tmp_path).state is State.DAMAGED
    assert not page_of(tmp_path).sound


def test_a_journal_that_is_a_folder_makes_the_run_unreadable_and_names_the_reason(tmp_path):
    (tmp_path / "journal.jsonl").mkdir()
    run = look(tmp_path)
    assert run.state is State.UNREADABLE
    assert run.reason
    assert not page_of(tmp_path).sound


def test_a_folder_that_is_gone_is_unreadable(tmp_path):
    assert look(tmp_path / "gone").state is State.UNREADABLE
    assert page_of(tmp_path / "gone").run.state is State.UNREADABLE


def test_the_code_of_a_halt_is_told(tmp_path):
    assert look(write(tmp_path / "a", start(), end("halted", 3, "NUM100 x"))).code == "NUM100"
    assert look(write(tmp_path / "b", start(), end("halted", 3, "\x1b[2J"))).code is None
    assert look(write(tmp_path / "c", start(), ("end", {"status": "halted", "halted": 7}))).code is None


# ---- how far ----


def test_a_step_that_is_tried_again_is_not_done(tmp_path):
    run_dir = write(tmp_path / "run", start(), step(1), step(2), step(3, action="retry_smaller_scale"))
    assert look(run_dir).step == 2


def test_a_rollback_and_a_resume_go_back(tmp_path):
    assert look(write(tmp_path / "a", start(), step(9), ("rollback", {"step": 9, "to_step": 4}))).step == 4
    assert look(write(tmp_path / "b", start(), step(9), start(20, "resume", 6))).step == 6


def test_the_length_is_that_of_the_newest_session(tmp_path):
    run_dir = write(tmp_path / "run", start(20), step(20), end(), start(50, "resume", 20), step(21))
    assert (look(run_dir).step, look(run_dir).total_steps) == (21, 50)


def test_a_length_that_the_run_has_passed_is_not_told(tmp_path):
    run_dir = write(tmp_path / "run", start(20), step(30), recipe="max_steps: 25\n")
    assert look(run_dir).total_steps is None
    (run_dir / "recipe.yaml").write_text("max_steps: 40\n")
    assert look(run_dir).total_steps == 40


def test_losses_are_told_as_they_are(tmp_path):
    run_dir = write(tmp_path / "run", start(), evaluated(0, 3.0), step(1, math.nan), evaluated(1, math.inf))
    run = look(run_dir)
    assert math.isnan(run.loss)
    assert (run.eval_first, run.eval_last) == (3.0, math.inf)


def test_one_held_out_loss_is_the_first_and_no_other(tmp_path):
    run = look(write(tmp_path / "run", start(), evaluated(0, 3.0), step(1)))
    assert (run.eval_first, run.eval_last) == (3.0, None)


@pytest.mark.parametrize("value", [None, True, "x", [1], {"a": 1}, 1 << 70, -0.0, "NaN"])
def test_values_of_any_kind_are_read_or_left_out(tmp_path, value):
    records = [
        (k, dict.fromkeys(("step", "total_steps", "loss", "time_s", "findings", "steps", "action"), value))
        for k in ("start", "step", "eval", "rollback", "save", "trusted", "state")
    ]
    run_dir = write(tmp_path / "run", *records, ("end", {"status": value}))
    json.dumps([look(run_dir).to_json(), page_of(run_dir).to_json()], default=str)


def test_numbers_of_records():
    assert real({"x": "NaN"}, "x") != real({"x": "NaN"}, "x")
    assert real({"x": "-Infinity"}, "x") == -math.inf
    assert [real({"x": v}, "x") for v in (1, -0.0, "abc", True, [], None)] == [1.0, -0.0, None, None, None, None]
    assert math.copysign(1, real({"x": -0.0}, "x")) == -1
    assert [integer({"x": v}, "x") for v in (3, True, 2.0, 1 << 70, None)] == [3, None, None, None, None]
    assert (real(None, "x"), integer(None, "x"), used_up(None)) == (None, None, None)


# ---- the ends of long journals ----


KINDS = st.sampled_from(["start", "step", "eval", "resume", "end", "rollback", "save", "finding", "state"])


def record_of(kind: str, number: int) -> tuple[str, dict]:
    facts = {"step": number, "loss": float(number), "total_steps": 1000, "steps": number, "to_step": number}
    return kind, {**facts, "status": "finished", "action": "proceed", "pad": "p" * (number * 37 % 300)}


@given(
    kinds=st.lists(KINDS, max_size=40), head=st.integers(1, 3000), tail=st.integers(1, 3000), block=st.integers(1, 900)
)
@settings(max_examples=100, **FIXTURE)
def test_what_the_ends_tell_is_true_whatever_the_windows(tmp_path, monkeypatch, kinds, head, tail, block):
    (tmp_path / "journal.jsonl").unlink(missing_ok=True)
    path = write(tmp_path, *(record_of(k, i) for i, k in enumerate(kinds))) / "journal.jsonl"
    sizes = {"HEAD": head, "TAIL": tail, "WHOLE_TAIL": tail // 2, "BLOCK": block}
    for name, value in sizes.items():
        monkeypatch.setattr(run_ends, f"_{name}_BYTES", value)
    ends, records = ends_of(path), list(read_journal(path))

    def newest(*wanted: str):
        return next((r for r in reversed(records) if r["kind"] in wanted), None)

    def oldest(*wanted: str):
        return next((r for r in records if r["kind"] in wanted), None)

    assert ends.first in (None, oldest("start", "resume"))
    assert ends.first_eval in (None, oldest("eval"))
    assert ends.opening in (None, newest("start", "resume"))
    assert ends.session in (None, newest("start", "resume", "end"))
    assert ends.step in (None, newest("step"))
    assert ends.last_eval in (None, newest("eval"))
    assert ends.move in (None, newest("start", "resume", "end", "step", "rollback"))
    assert ends.num_damaged == 0
    if head > path.stat().st_size:
        assert ends.first_eval == oldest("eval")
    if tail > 2 * path.stat().st_size:
        assert (ends.step, ends.last_eval, ends.opening) == (newest("step"), newest("eval"), newest("start", "resume"))


def test_a_long_journal_is_read_at_its_ends_only(tmp_path):
    """Between its ends lies a hole of 1 GiB: reading it would take seconds."""
    path = write(tmp_path / "run", start(10**6), evaluated(0, 3.0), step(1)) / "journal.jsonl"
    newer = write(tmp_path / "newer", *(step(n) for n in range(70, 80))) / "journal.jsonl"
    with path.open("r+b") as handle:
        handle.seek(1 << 30, os.SEEK_END)
        handle.write(b"\n" + newer.read_bytes())
    before_s = time.process_time()
    run = look(tmp_path / "run")
    assert time.process_time() - before_s < 0.5
    assert (run.step, run.total_steps, run.eval_first) == (79, 10**6, 3.0)


def test_a_hundred_long_runs_are_listed_quickly(tmp_path):
    """Links to one journal of 20 000 steps: more of it is not read in any case."""
    first = write(tmp_path / "run-0", start(10**6), *(step(n, rows=["r" * 200]) for n in range(1, 20_000)))
    for number in range(1, 100):
        (tmp_path / f"run-{number}").mkdir()
        os.link(first / "journal.jsonl", tmp_path / f"run-{number}" / "journal.jsonl")
    before_s = time.process_time()
    found = listed(tmp_path)
    assert time.process_time() - before_s < 3.0
    assert [run.step for run in found] == [19_999] * 100


# ---- damage ----


def test_a_changed_bit_is_counted_and_the_rest_is_read(tmp_path):
    run_dir = write(tmp_path / "run", start(), *(step(n) for n in range(1, 6)), end(steps=5))
    path = run_dir / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"loss": 2.0', b'"loss": 3.0')
    path.write_bytes(b"".join(lines))
    assert look(run_dir).num_damaged_lines == 1
    page = page_of(run_dir)
    assert (len(page.damage), page.damage[0].line, page.sound) == (1, 3, False)
    assert page.actions["proceed"] == 4
    assert page.run.state is State.FINISHED


def test_a_torn_end_is_no_damage(tmp_path):
    run_dir = write(tmp_path / "run", start(), step(1), step(2))
    whole = (run_dir / "journal.jsonl").read_bytes()
    for cut in range(1, 60):
        (run_dir / "journal.jsonl").write_bytes(whole[:-cut])
        assert (look(run_dir).state, look(run_dir).num_damaged_lines) == (State.KILLED, 0)
        assert page_of(run_dir).sound
    assert look(run_dir).step == 1


def test_a_line_that_a_kill_tore_before_a_resume_is_no_damage_in_old_journals(tmp_path):
    old = [{"schema": 1, "kind": k, "time": 1.0, **r} for k, r in (start(), step(1), start(20, "resume", 1), step(2))]
    lines = [json.dumps(r).encode() for r in old]
    (tmp_path / "journal.jsonl").write_bytes(b"\n".join([*lines[:2], lines[1][:30], *lines[2:], b""]))
    assert (look(tmp_path).step, look(tmp_path).num_damaged_lines) == (2, 0)


@given(content=st.binary(max_size=3000))
@settings(max_examples=100, **FIXTURE)
def test_no_bytes_make_the_reader_fail(tmp_path, content):
    for name in ("journal.jsonl", "summary.json", "recipe.yaml"):
        (tmp_path / name).write_bytes(content)
    folder = tmp_path / "checkpoint-3"
    folder.mkdir(exist_ok=True)
    for name in ("manifest.json", "trusted.json"):
        (folder / name).write_bytes(content)
    run, page = look(tmp_path), page_of(tmp_path, verify=True)
    assert run.state is State.DAMAGED or not content
    assert page.run.checkpoints[0].faults
    assert not page.run.checkpoints[0].trusted


@given(where=st.floats(0, 1), change=st.integers(1, 255))
@settings(max_examples=60, **FIXTURE)
def test_a_valid_journal_with_any_byte_changed_is_read_and_told(tmp_path, where, change):
    (tmp_path / "journal.jsonl").unlink(missing_ok=True)
    path = write(tmp_path, start(), evaluated(0, 3.0), step(1), step(2), end(steps=2)) / "journal.jsonl"
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 2))] ^= change
    path.write_bytes(content)
    assert isinstance(look(tmp_path).state, State)
    # The last line may be torn: then it is left out, and the run counts as killed.
    assert page_of(tmp_path).damage or look(tmp_path).state is State.KILLED


MANIFESTS = [
    b"",
    b"null",
    b'{"files": 3}',
    b'{"files": {"a": 3}}',
    b'{"files": {"a": {"bytes": "x"}, "b\\u0000": {}}}',
    b'{"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}',
    b"[" * 50_000,
]


@pytest.mark.parametrize("content", MANIFESTS)
@pytest.mark.parametrize("digests", [True, False])
def test_a_manifest_of_anything_is_a_fault(tmp_path, content, digests):
    (tmp_path / "manifest.json").write_bytes(content)
    assert faults_of(tmp_path, digests=digests)


# ---- checkpoints ----


def test_checkpoints_are_told_newest_first_with_their_trust(tmp_path):
    run_dir = write(tmp_path / "run", start(), evaluated(4, 2.5), step(12))
    for number in (4, 100, 8):
        add_checkpoint(run_dir, number, trusted=number < 10)
    (run_dir / "checkpoint-x").mkdir()
    (run_dir / "checkpoint-7").write_text("a file")
    (run_dir / ".checkpoint-9.1-a.tmp").mkdir()
    found = look(run_dir).checkpoints
    assert [(c.step, c.trusted, c.faults) for c in found] == [(100, False, None), (8, True, None), (4, True, None)]
    assert found[0].num_bytes == size_of(run_dir / "checkpoint-100") > 1500
    page = page_of(run_dir).to_json()
    assert [c["eval_loss"] for c in page["checkpoints"]] == [None, None, 2.5]
    assert [c["faults"] for c in page["checkpoints"]] == [[], [], []]


def test_a_mark_of_trust_that_belongs_to_another_manifest_is_none(tmp_path):
    run_dir = write(tmp_path / "run", start())
    shutil.copy(add_checkpoint(run_dir, 4, trusted=True) / "trusted.json", add_checkpoint(run_dir, 8))
    assert [c.trusted for c in look(run_dir).checkpoints] == [False, True]


def test_sizes_are_always_compared_and_digests_when_asked_for(tmp_path):
    run_dir = write(tmp_path / "run", start())
    (add_checkpoint(run_dir, 4) / "model.safetensors").write_bytes(b"x" * 1000)
    (add_checkpoint(run_dir, 8) / "model.safetensors").write_bytes(b"w" * 999)
    (add_checkpoint(run_dir, 12) / "optimizer.safetensors").unlink()
    by_size = [c.faults for c in page_of(run_dir).run.checkpoints]
    assert by_size == [("optimizer.safetensors: missing",), ("model.safetensors: 999 bytes, expected 1000",), ()]
    (digest,) = page_of(run_dir, verify=True).run.checkpoints[-1].faults
    assert "digest" in digest
    assert not page_of(run_dir, verify=True).sound


def test_a_trusted_checkpoint_passes_the_full_check(tmp_path):
    run_dir = write(tmp_path / "run", start())
    add_checkpoint(run_dir, 4, trusted=True)
    assert page_of(run_dir, verify=True).sound


def test_checkpoints_that_are_gone_are_told_and_nothing_is_offered(tmp_path):
    run_dir = write(tmp_path / "run", start(), step(4), ("save", {"step": 4, "path": "checkpoint-4"}))
    assert (look(run_dir).has_lost_checkpoints, look(run_dir).can_go_on) == (True, False)
    add_checkpoint(run_dir, 4)
    assert (look(run_dir).has_lost_checkpoints, look(run_dir).can_go_on) == (False, True)


def test_checkpoints_put_aside_are_counted_apart(tmp_path):
    run_dir = write(tmp_path / "run", start())
    add_checkpoint(run_dir, 8).rename(run_dir / "abandoned-1-checkpoint-8")
    page = page_of(run_dir)
    assert (page.num_aside, page.run.checkpoints) == (1, ())
    assert page.aside_bytes > 1500


def test_the_names_are_those_of_the_modules_that_load_torch():
    assert runs.CHECKPOINT_PREFIX == checkpoint.PREFIX
    assert runs.TRUSTED_FILE == checkpoint.TRUSTED_FILE
    assert set(runs.ASIDE_PREFIXES) == {keeper.ABANDONED, resume.DAMAGED}


# ---- folders ----


def test_runs_are_listed_the_newest_change_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        run_dir = write(tmp_path / name, start())
        for file in run_dir.iterdir():
            os.utime(file, (1e9 - age, 1e9 - age))
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").write_text("x")
    write(tmp_path / ".hidden", start())
    assert [run.path.name for run in listed(tmp_path)] == ["new", "middle", "old"]
    assert not is_run(tmp_path / "no-run")
    assert not is_run(tmp_path / "a\0b")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_in_circles_end(tmp_path):
    run_dir = write(tmp_path / "run", start())
    (run_dir / "self").symlink_to(run_dir)
    (run_dir / "broken").symlink_to(run_dir / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert [r.path.name for r in listed(tmp_path)] == ["run"]
    assert look(run_dir).num_bytes < 10_000


def test_looking_changes_nothing(tmp_path):
    run_dir = write(tmp_path / "run", start(), step(1))
    add_checkpoint(run_dir, 4, trusted=True)

    def picture() -> dict:
        return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*")}

    before = picture()
    listed(tmp_path)
    page_of(run_dir, verify=True)
    assert picture() == before


def test_runs_that_come_and_go_while_they_are_listed(tmp_path):
    source = write(tmp_path / "source", start(), step(1), end())
    add_checkpoint(source, 4, trusted=True)
    home = tmp_path / "runs"
    home.mkdir()
    write(home / "stays", start(), step(1), end())
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            shutil.copytree(source, home / "comes")
            shutil.rmtree(home / "comes")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        end_s = time.monotonic() + 1.0
        while time.monotonic() < end_s:
            names = [run.path.name for run in listed(home)]
            assert set(names) <= {"stays", "comes"}
            assert "stays" in names
            page_of(home / "comes", verify=True)
    finally:
        stop.set()
        thread.join()


# ---- the page ----


def test_the_page_counts_findings_of_steps_and_beside_them(tmp_path):
    found = {"code": "NUM030", "severity": "warning"}
    records = [start(), ("finding", {"code": "DAT100"}), step(1, findings=[found, found]), step(2, findings=["x", 3])]
    page = page_of(write(tmp_path / "run", *records, ("finding", {"code": ["bad"]})))
    assert page.findings == {"DAT100": 1, "NUM030": 2}


def test_the_page_tells_where_the_time_went(tmp_path):
    times = [("start", 100.0), ("step", 101.0), ("eval", 104.0), ("save", 104.5), ("resume", 900.0), ("step", 901.0)]
    lines = [json.dumps({"kind": k, "time": t, "time_s": 0.75, "step": 1, "loss": 1}) for k, t in times]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(tmp_path)
    assert page.times_s == {"steps": 2.0, "evaluation": 3.0, "saving": 0.5}
    assert page.train_time_s == 1.5


def test_a_clock_that_jumps_takes_nothing_away(tmp_path):
    times = [100.0, 50.0, "NaN", math.inf, None, "soon", 51.0, 52.0]
    lines = [json.dumps({"kind": "step", "time": t, "time_s": -1}).replace("Infinity", '"Infinity"') for t in times]
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(tmp_path)
    assert sum(page.times_s.values()) == 1.0
    assert page.train_time_s == 0.0


def test_a_line_too_long_to_be_a_record_costs_no_memory_and_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run_page, "_LONGEST_LINE_BYTES", 1000)
    run_dir = write(tmp_path / "run", start(), step(1, pad="p" * 5000), step(2), end(steps=2))
    page = page_of(run_dir)
    assert page.actions == {"proceed": 1}
    assert [d.line for d in page.damage] == [2]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff", "[" * 5000])
def test_a_broken_summary_is_told(tmp_path, content):
    run_dir = write(tmp_path / "run", start(), end())
    (run_dir / "summary.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert page_of(run_dir).summary_fault
    (run_dir / "summary.json").write_text("{}")
    assert page_of(run_dir).summary_fault == ""


# ---- real runs ----


def test_a_journal_is_read_while_it_is_written(tmp_path):
    stop = threading.Event()
    run_dir = write(tmp_path / "run", start(10**6))

    def train() -> None:
        journal = Journal(run_dir / "journal.jsonl")
        give_back, number = hold(run_dir), 0
        while not stop.is_set():
            number += 1
            journal.write("step", step=number, loss=1.0, action="proceed", rows=["r" * 300])
        journal.close()
        give_back()

    thread = threading.Thread(target=train)
    thread.start()
    seen, states, damage = [0], set(), 0
    try:
        while seen[-1] < 300:
            run, page = look(run_dir), page_of(run_dir)
            states |= {run.state, page.run.state}
            damage += run.num_damaged_lines + len(page.damage)
            seen.append(run.step)
    finally:
        stop.set()
        thread.join()
    assert seen == sorted(seen)
    assert (damage, states - {State.RUNNING, State.KILLED}) == (0, set())
    assert State.RUNNING in states


def test_a_real_run_in_each_state(tmp_path):
    recipe = tiny_recipe(tmp_path, "max_steps=6", "save_steps=2", "eval_steps=3", f"output_dir={tmp_path / 'done'}")
    train_run(recipe)
    halting = open_run(recipe.model_copy(update={"output_dir": str(tmp_path / "halted"), "max_steps": 20}))
    port = halting.prepared.port
    poison_output(port.parts.model.get_submodule("model.layers.0.mlp.down_proj"), at_step(port, *range(4, 99)))
    try:
        halting.run()
    finally:
        halting.start.close()
    done, halted = look(tmp_path / "done"), look(tmp_path / "halted")
    assert (done.state, done.step, done.total_steps) == (State.FINISHED, 6, 6)
    assert done.eval_first > done.eval_last > 0
    page = page_of(tmp_path / "done", verify=True)
    assert page.sound
    assert page.has_final
    assert page.actions == {"proceed": 6}
    assert page.derived["precision"] == "fp32"
    assert 0 < page.train_time_s <= sum(page.times_s.values())
    assert (halted.state, halted.code, halted.can_go_on) == (State.HALTED, "NUM104", True)
    assert math.isnan(halted.loss)
    assert page_of(tmp_path / "halted").findings["NUM001"] >= 1


SLOW_RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from support.runs import tiny_recipe
from finitune.train.run import train_run

class Slow:
    def on_step(self, event):
        if event.reading.step >= 5:
            print("five", flush=True)
            time.sleep(60)

settings = ("max_steps=8", "save_steps=2", "guard.trust_steps=1", "save_in_background=false")
train_run(tiny_recipe(Path(sys.argv[1]), *settings), observers=[Slow()])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_real_run_is_running_then_killed_then_finished(tmp_path):
    tests = str(Path(__file__).parents[1])
    child = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(tmp_path), tests], stdout=subprocess.PIPE, text=True)
    run_dir = tmp_path / "run"
    try:
        assert child.stdout.readline() == "five\n"
        running = look(run_dir)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()
    assert (running.state, running.step, running.holder["pid"]) == (State.RUNNING, 5, child.pid)
    killed = look(run_dir)
    assert (killed.state, killed.step, killed.total_steps, killed.can_go_on) == (State.KILLED, 5, 8, True)
    assert killed.checkpoints[-1].trusted
    train_run(None, resume=str(run_dir))
    assert (look(run_dir).state, look(run_dir).step) == (State.FINISHED, 8)
    assert (len(page_of(run_dir).sessions), page_of(run_dir).sound) == (2, True)
