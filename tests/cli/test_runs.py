"""``finitune runs``: the list, the page of one run, and what it refuses."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.cli.runs_words import ago, clean, loss_change, shell_word, size_text
from finitune.core.codes import all_codes
from finitune.core.files import write_manifest
from finitune.core.journal import Journal, read
from finitune.core.messages.catalogue import set_language, text
from finitune.report.words import width
from finitune.train.lock import hold
from finitune.train.runs import State

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="such names are not possible there")
EVIL = "evil\n\x1b[31m\x9b2J[bold]red[bold] 'quoted'\u202e"


def write(run_dir: Path, *records: tuple[str, dict], total: int = 200) -> Path:
    """A run folder with a start and these records."""
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(f"max_steps: {total}\n")
    journal = Journal(run_dir / "journal.jsonl")
    journal.write("start", step=0, total_steps=total, derived={"precision": "fp32", "odd\x1b[0m": "x\x1b[2J"})
    for kind, record in records:
        journal.write(kind, **record)
    journal.close()
    return run_dir


STEPS = [
    ("eval", {"step": 0, "loss": 3.25}),
    ("step", {"step": 119, "loss": 2.75, "action": "proceed", "time_s": 0.5, "findings": [{"code": "NUM030"}]}),
    ("step", {"step": 120, "loss": 2.5, "action": "proceed", "time_s": 0.5, "findings": [{"code": "XYZ\x1b"}]}),
    ("eval", {"step": 120, "loss": 2.125}),
]


def end(status: str, **more) -> tuple[str, dict]:
    return "end", {"status": status, "steps": 120, **more}


def checkpoint(run_dir: Path, step: int) -> Path:
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"w" * 3000)
    write_manifest(folder, {"step": step})
    return folder


@pytest.fixture
def home(cli, tmp_path):
    """A folder runs/ with a run in each state."""
    runs = tmp_path / "runs"
    for status in ("finished", "interrupted", "halted"):
        checkpoint(write(runs / status, *STEPS, end(status, halted="NUM100 why")), 120)
    checkpoint(write(runs / "killed", *STEPS), 100)
    write(runs / "fresh")
    write(runs / "lost", *STEPS, ("save", {"step": 120, "path": "checkpoint-120"}))
    (runs / "finished" / "final").mkdir()
    (runs / "damaged").mkdir()
    (runs / "damaged" / "journal.jsonl").write_bytes(b"\xff\n\xfe\n" * 100)
    (runs / "no-run").mkdir()
    return runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(cli, monkeypatch, columns: int, *words: str) -> str:
    """What a terminal of so many columns gets."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        from finitune.cli.main import main

        assert main(words) in (0, 1)
    return terminal.getvalue()


def test_every_run_is_listed_with_its_state(cli, home):
    ran = cli("runs")
    assert (ran.code, ran.err) == (0, "")
    lines = {line.split()[0]: line for line in ran.out.splitlines() if line.strip()}
    for name in ("finished", "interrupted", "killed"):
        assert f"{name}  " in lines[name]
        assert "120/200  2.5   3.25 -> 2.125" in lines[name]
    assert "halted NUM100" in lines["halted"]
    assert "no-run" not in ran.out
    assert {r["name"]: r["state"] for r in cli("runs", "--json").record["runs"]} == {
        "finished": "finished",
        "interrupted": "interrupted",
        "halted": "halted",
        "killed": "killed",
        "fresh": "killed",
        "lost": "killed",
        "damaged": "damaged",
    }


def test_the_exact_command_is_given_for_those_that_can_go_on(cli, home):
    out = cli("runs").out
    go_on, begin = (out.index(text(k)) for k in ("runs.go_on", "runs.begin"))
    for name in ("interrupted", "halted", "killed"):
        assert go_on < out.index(f"  finitune train --resume runs/{name}\n") < begin
    assert begin < out.index("  finitune train --resume runs/fresh\n")
    assert out.count("--resume") == 4
    assert "lost: its journal tells of checkpoints" in out


def test_the_newest_change_comes_first(cli, home):
    for number, name in enumerate(("killed", "finished")):
        for file in (home / name).iterdir():
            os.utime(file, (2e9 - number, 2e9 - number))
    assert [r["name"] for r in cli("runs", "--json").record["runs"]][:2] == ["killed", "finished"]
    assert cli("runs", "latest", "--json").record["run"]["name"] == "killed"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("words", [[], ["runs/killed"], ["runs/finished"], ["runs/damaged"]])
def test_eighty_columns_are_enough(cli, home, monkeypatch, language, words):
    out = on_terminal(cli, monkeypatch, 80, "runs", *words, "--lang", language)
    assert max(width(line) for line in out.splitlines() if "finitune" not in line) <= 80
    assert "\x1b" not in out.replace("\x1b[1m", "").replace("\x1b[0m", "")


def test_a_wide_terminal_gets_a_table_and_a_narrow_one_lines(cli, home, monkeypatch):
    wide, narrow = (on_terminal(cli, monkeypatch, n, "runs") for n in (120, 60))
    assert "held-out" in next(line for line in wide.splitlines() if "name" in line)
    assert "trusted 0" not in wide
    assert "    step 120/200   loss 2.5   held-out 3.25 -> 2.125\n" in narrow
    assert "    checkpoints 1, last 120   trusted 0   " in narrow


def test_a_running_run_names_its_process(cli, home):
    give_back = hold(home / "killed")
    try:
        assert f"running: process {os.getpid()} on " in cli("runs", "runs/killed").out
        assert "--resume runs/killed" not in cli("runs").out
        assert cli("runs", "runs/killed", "--json").record["run"]["holder"]["pid"] == os.getpid()
    finally:
        give_back()


def test_the_page_of_one_run(cli, home):
    ran = cli("runs", "runs/killed")
    assert ran.code == 0
    for wanted in (
        "killed: its last session never ended",
        "120/200",
        "3.25 -> 2.125 (2 evaluations)",
        "2 committed, 0 refused",
        "NUM030",
        all_codes()["NUM030"].en.title,
        "(not a code of this version)",
        "100   candidate  4 KiB  -         sizes agree",
        "  finitune train --resume runs/killed\n",
    ):
        assert wanted in ran.out
    assert "\x1b" not in ran.out


def test_a_checkpoint_stands_for_its_run(cli, home):
    assert cli("runs", "runs/killed/checkpoint-100").out == cli("runs", "runs/killed").out


def test_a_finished_run_tells_how_to_use_it(cli, home):
    out = cli("runs", "runs/finished").out
    assert "  finitune chat runs/finished\n" in out
    assert "  finitune export runs/finished/final my-model\n" in out
    assert "--resume" not in out


def test_verify_reads_every_byte_and_a_fault_is_exit_code_1(cli, home):
    assert "digests agree" in cli("runs", "runs/killed", "--verify").out
    path = home / "killed" / "checkpoint-100" / "model.safetensors"
    path.write_bytes(b"x" * 3000)
    assert cli("runs", "runs/killed").code == 0
    ran = cli("runs", "runs/killed", "--verify")
    assert (ran.code, "model.safetensors: content differs" in ran.out) == (1, True)
    path.write_bytes(b"x")
    ran = cli("runs", "runs/killed", "--json")
    assert ran.code == ran.record["exit_code"] == 1
    assert ran.record["run"]["checkpoints"][0]["faults"] == ["model.safetensors: 1 bytes, expected 3000"]


def test_a_damaged_journal_is_named_by_its_lines(cli, home):
    path = home / "killed" / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"loss": 2.75', b'"loss": 2.74'))
    assert "killed: 1 line(s) of its journal are damaged" in cli("runs").out
    ran = cli("runs", "runs/killed")
    assert (ran.code, "line 3: bits changed" in ran.out) == (1, True)
    assert ran.out.count("NUM030") == 0


def test_a_broken_summary_is_told(cli, home):
    (home / "finished" / "summary.json").write_text("{\x1b")
    assert "summary.json" in cli("runs", "runs/finished").out


# ---- parquet ----


def test_the_steps_as_parquet(cli, home):
    parquet = pytest.importorskip("pyarrow.parquet")
    ran = cli("runs", "runs/killed", "--parquet", "steps.parquet")
    assert "Wrote the steps of killed to steps.parquet" in ran.out
    assert parquet.read_table("steps.parquet")["loss"].to_pylist() == [2.75, 2.5]
    again = cli("runs", "runs/killed", "--parquet", "steps.parquet", "--json")
    assert (again.code, again.record["parquet"]["path"]) == (0, "steps.parquet")


@pytest.mark.parametrize("target", ["runs/killed/journal.jsonl", "runs", "no/such\0name"])
def test_a_slip_of_the_target_costs_nothing(cli, home, target):
    before = (home / "killed" / "journal.jsonl").read_bytes()
    ran = cli("runs", "runs/killed", "--parquet", target)
    assert (ran.code, ran.err.split()[0] in ("CFG060", "CFG064")) == (2, True)
    assert (home / "killed" / "journal.jsonl").read_bytes() == before


def test_a_run_without_a_journal_gives_no_table(cli, home):
    (home / "killed" / "journal.jsonl").unlink()
    ran = cli("runs", "runs/killed", "--parquet", "x.parquet")
    assert (ran.code, "journal.jsonl" in ran.err, Path("x.parquet").exists()) == (2, True, False)


@pytest.mark.parametrize("option", [["--verify"], ["--parquet", "x"]])
def test_options_of_one_run_are_refused_for_a_list(cli, home, option):
    ran = cli("runs", *option)
    assert (ran.code, ran.out) == (2, "")
    assert f"{option[0]} needs one run, and runs holds 7" in ran.err


# ---- where there is nothing ----


def test_without_any_run_it_says_so_in_words(cli, tmp_path):
    for words in (["runs"], ["runs", str(tmp_path)]):
        ran = cli(*words)
        assert (ran.code, ran.out.startswith("There are no runs in")) == (0, True)
    assert cli("runs", "--json").record["runs"] == []


@pytest.mark.parametrize("name", ["absent", "file", "full", "file/x", "latest", "a\0b", "x" * 5000, "checkpoint-3"])
def test_a_path_that_is_no_run_and_holds_none_is_exit_code_2(cli, tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    for words in (["runs", name], ["runs", name, "--verify"]):
        ran = cli(*words)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.split()[0] in ("SYS031", "SYS032")
        assert "Traceback" not in ran.err
    assert cli("runs", name, "--json").record["errors"][0]["code"] in ("SYS031", "SYS032")


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_told(cli, home):
    home.chmod(0)
    try:
        assert cli("runs").err.startswith("SYS032 ")
    finally:
        home.chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_told(cli, home, monkeypatch):
    def refused(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    ran = cli("runs", "runs")
    assert (ran.code, ran.err.startswith("SYS032 runs cannot be listed: Permission denied")) == (2, True)


def test_runs_itself_may_be_a_run(cli, tmp_path):
    write(tmp_path / "runs", *STEPS)
    assert cli("runs").out == cli("runs", "runs").out
    assert "120/200" in cli("runs").out


# ---- names that want to be more than names ----


@POSIX
def test_a_name_is_never_a_command_to_the_terminal(cli, tmp_path, monkeypatch):
    run_dir = write(tmp_path / "runs" / EVIL, *STEPS, end("halted", halted="\x1b[2J"))
    checkpoint(run_dir, 100)
    os.rename(os.fsencode(run_dir), os.fsencode(run_dir) + b"\xff")
    run = f"runs/{EVIL}\udcff"
    for words in (["runs"], ["runs", run], ["runs", run, "--verify"]):
        shown = [cli(*words).out, on_terminal(cli, monkeypatch, 200, *words)]
        for out in shown:
            plain = out.replace("\x1b[1m", "").replace("\x1b[0m", "")
            assert all(c.isprintable() or c == "\n" for c in plain)
            assert r"evil\n\x1b[31m\x9b2J[bold]red[bold]" in out
    assert cli("runs", "--json").record["runs"][0]["name"] == f"{EVIL}\udcff"
    assert "\x1b" not in cli("runs", "runs/\x1b[2J").err


@POSIX
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", [EVIL, "a b", "-x", "it's", "é", "$HOME `x`", "\udcff\udc80", "\t7", "\x017"])
def test_the_command_that_is_shown_can_be_pasted(name):
    word = shell_word(Path("runs") / name)
    assert word.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s' {word}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(f"runs/{name}")


@given(st.text())
def test_what_is_cleaned_is_printable_and_short_of_nothing(words):
    assert clean(words).isprintable()
    assert clean(clean(words)) == clean(words)
    if words.isprintable():
        assert clean(words) == words


# ---- words ----


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5.0, "now"),
        (1.9, "now"),
        (2.0, "2 s ago"),
        (119.0, "119 s ago"),
        (120.0, "2 min ago"),
        (7199.0, "119 min ago"),
        (7200.0, "2 h ago"),
        (172800.0, "2 d ago"),
        (1e9, "11574 d ago"),
    ],
)
def test_ago(seconds, shown):
    assert ago(1e9, 1e9 + seconds) == shown


def test_sizes_and_losses():
    assert [size_text(n) for n in (0, 1, 1024, 1 << 20, 3 << 30)] == ["0 KiB", "1 KiB", "1 KiB", "1 MiB", "3.0 GiB"]
    assert [loss_change(*pair) for pair in ((None, None), (1.5, None), (None, 1.5), (3.0, float("nan")))] == [
        "-",
        "1.5",
        "1.5",
        "3 -> nan",
    ]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_state_has_its_words(language):
    set_language(language)
    try:
        assert all(text(f"runs.state.{s.value}") and text(f"runs.about.{s.value}") for s in State)
    finally:
        set_language(None)


def test_every_argument_is_explained(cli):
    page = "".join(cli("runs", "--help").out.split())
    assert all("".join(text(f"cli.runs.{name}").split()) in page for name in ("path", "verify", "parquet"))


def test_the_journal_of_these_tests_is_sound(home):
    assert len(list(read(home / "killed" / "journal.jsonl"))) == 5
