"""The console script: exit codes, one JSON object, languages, errors, and a start without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finitune.cli import version
from finitune.cli.main import COMMANDS
from finitune.cli.session import Session, peek
from finitune.core.codes import Code, Text
from finitune.core.errors import Halted, UserError, UserErrors
from finitune.core.messages.catalogue import set_language, text
from finitune.core.types import Severity

CODE = Code("CFG098", Severity.ERROR, Text("t", "what {n}", "why", ("try",)), Text("t", "zh {n}", "", ()))

GROUP = ("recipes list", "recipes show", "recipes copy")
PAGES = ("", *COMMANDS, *GROUP)


def fail_with(monkeypatch, error: BaseException) -> None:
    """Make ``finitune version`` raise."""

    def broken():
        raise error

    monkeypatch.setattr(version, "versions", broken)


def squeezed(page: str) -> str:
    """A page without white space: help wraps lines."""
    return "".join(page.split())


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_help_page_speaks_the_language_of_the_reader(cli, page, language):
    ran = cli(*page.split(), "--help", "--lang", language)
    set_language(language)
    try:
        name = page.split()[-1] if page else ""
        area = "cli.recipes" if page in GROUP else f"cli.{name}" if name else "cli"
        key = f"{area}.{name}" if page in GROUP else f"{area}.help"
        wanted = [key, "cli.option.lang", "cli.option.json", "cli.option.debug", "cli.option.help"]
        assert all(squeezed(text(k)) in squeezed(ran.out) for k in wanted)
    finally:
        set_language(None)
    assert ran.code == 0
    assert "cli." not in ran.out, "a key that was not translated"
    assert ("用法：" in ran.out) == (language == "zh")
    assert ran.err == ""


OPTIONS = {
    "train": ["arguments", "resume", "allow_changes", "dry_run"],
    "chat": ["path", "prompt", "system", "max_new_tokens", "temperature", "top_p", "seed", "device"],
    "export": ["source", "out", "layout", "dtype", "step", "overwrite"],
    "explain": ["code"],
}


@pytest.mark.parametrize(("command", "names"), OPTIONS.items())
def test_every_argument_is_explained(cli, command, names):
    page = squeezed(cli(command, "--help").out)
    assert all(squeezed(text(f"cli.{command}.{name}")) in page for name in names)


def test_commands_are_listed_in_order(cli):
    page = cli("--help").out
    places = [page.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)


def test_no_command_is_a_question_answered_with_help_and_exit_code_2(cli):
    ran = cli()
    assert (ran.code, ran.out.startswith("Usage:")) == (2, True)


def test_shared_options_stand_before_or_after_the_command(cli):
    for words in (["--json", "version"], ["version", "--json"]):
        assert cli(*words).record["versions"]["finitune"]
    for words in (["--lang", "zh", "explain", "CFG005"], ["explain", "--lang=zh", "CFG005"]):
        assert "未知的键" in cli(*words).out


def test_the_environment_chooses_the_language(cli, monkeypatch):
    monkeypatch.delenv("FINITUNE_LANG")
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert "未知的键" in cli("explain", "CFG005").out


PEEKS = [
    ([], Session()),
    (["train", "--json"], Session(json=True)),
    (["--lang", "zh", "x"], Session(lang="zh")),
    (["--lang=zh", "--debug"], Session(lang="zh", debug=True)),
    (["--lang"], Session()),
    (["chat", "--", "--json"], Session()),
]


@pytest.mark.parametrize(("words", "session"), PEEKS)
def test_shared_options_are_known_before_parsing(words, session):
    assert peek(words) == session


USAGE = [
    ["trian"],
    ["--nonsense"],
    ["train", "--nonsense"],
    ["train", "--resume"],
    ["explain", "a", "b"],
    ["chat"],
    ["chat", "m", "--temperature", "warm"],
    ["chat", "m", "--top-p", "1.5"],
    ["export", "a", "b", "--dtype", "int3"],
    ["recipes", "shwo"],
    ["--lang", "fr", "version"],
    ["version", "--lang"],
]


@pytest.mark.parametrize("words", USAGE)
def test_wrong_usage_is_one_message_and_exit_code_2(cli, words):
    ran = cli(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("CFG060 ")
    assert "--help" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("words", USAGE)
def test_wrong_usage_in_json(cli, words):
    ran = cli(*words, "--json") if words[-1] not in ("--resume", "--lang") else cli("--json", *words)
    assert ran.code == ran.record["exit_code"] == 2
    assert ran.record["ok"] is False
    assert ran.record["errors"][0]["code"] == "CFG060"


def test_a_close_command_is_offered(cli):
    assert "train" in cli("trian").err


def test_user_errors_are_told_together(cli, monkeypatch):
    fail_with(monkeypatch, UserErrors([UserError(CODE, "a", n=1), UserError(CODE, "b", n=2)]))
    ran = cli("version")
    assert (ran.code, ran.out) == (2, "")
    assert "what 1" in ran.err
    assert "what 2" in ran.err
    record = cli("version", "--json").record
    assert [(e["code"], e["where"], e["data"]) for e in record["errors"]] == [
        ("CFG098", "a", {"n": 1}),
        ("CFG098", "b", {"n": 2}),
    ]


def test_a_halt_is_exit_code_3(cli, monkeypatch):
    fail_with(monkeypatch, Halted(CODE, "run", n=float("nan")))
    assert cli("version").code == 3
    assert cli("version", "--json").record["errors"][0]["data"] == {"n": "NaN"}


def test_an_unforeseen_error_is_exit_code_4_with_the_traceback_in_a_file(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    ran = cli("version")
    assert (ran.code, ran.out) == (4, "")
    assert "ZeroDivisionError: by zero" in ran.err
    assert "Traceback" not in ran.err
    (written,) = tmp_path.glob("finitune-error-*.txt")
    assert str(written) in ran.err
    assert "Traceback" in written.read_text()
    assert "by zero" in written.read_text()


def test_debug_prints_the_traceback(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    assert "Traceback" in cli("version", "--debug").err
    ran = cli("version", "--json")
    assert Path(ran.record["errors"][0]["data"]["traceback"]).is_file()


def test_a_traceback_that_no_folder_takes_goes_to_stderr(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    ran = cli("version")
    assert ran.code == 4
    assert "Traceback" in ran.err


def test_ctrl_c_is_130(cli, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    ran = cli("version")
    assert (ran.code, "Traceback" in ran.err) == (130, False)
    assert cli("version", "--json").record["exit_code"] == 130


def test_with_json_nothing_else_reaches_stdout(cli, monkeypatch):
    def chatty():
        print("noise of a library")
        return {"finitune": "1"}

    monkeypatch.setattr(version, "versions", chatty)
    ran = cli("version", "--json")
    assert ran.record["versions"] == {"finitune": "1"}
    assert "noise" in ran.err


def test_json_help_is_json(cli):
    assert cli("train", "--help", "--json").record["help"].startswith("Usage:")


def test_the_language_does_not_outlive_a_call(cli):
    cli("explain", "CFG005", "--lang", "zh")
    assert "unknown key" in cli("explain", "CFG005").out


def finitune(*words: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "FINITUNE_LANG": "en", "PYTHONWARNINGS": "default", **environment}
    return subprocess.run(
        [sys.executable, "-m", "finitune.cli.main", *words], capture_output=True, text=True, env=env, check=False
    )


PROBE = "import sys; from finitune.cli.main import main; code = main(sys.argv[1:]); "
HEAVY = "print('HEAVY', [m for m in ('torch', 'transformers', 'peft', 'rich') if m in sys.modules])"
LIGHT = [["--help"], ["explain", "CFG005"], ["explain"], ["version"], ["recipes", "list"], ["train", "--help"]]


@pytest.mark.parametrize("words", LIGHT)
def test_light_commands_load_nothing_heavy(words):
    done = subprocess.run([sys.executable, "-c", PROBE + HEAVY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n")


def test_the_probe_for_heavy_modules_can_fail():
    done = subprocess.run(
        [sys.executable, "-c", PROBE + "import rich; " + HEAVY, "version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("HEAVY ['rich']\n")


@pytest.mark.parametrize("words", [["--help"], ["explain", "CFG005"]])
def test_light_commands_start_fast(words):
    """Best of five in processor time, so that a busy machine does not decide; twice the budget of 0.3 s."""
    best = min(_processor_s(words) for _ in range(5))
    assert best < 0.6


def _processor_s(words: list[str]) -> float:
    before = os.times()
    assert finitune(*words).returncode == 0
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


def test_the_script_as_a_process():
    assert finitune("train", "nope").returncode == 2
    assert "未知的键" in finitune("explain", "CFG005", FINITUNE_LANG="zh").stdout
    plain = finitune("explain", "CFG005", FINITUNE_LANG="zh", PYTHONIOENCODING="ascii")
    assert plain.returncode == 0, plain.stderr
    assert "\x1b[" not in finitune("explain").stdout


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m finitune.cli.main explain | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
